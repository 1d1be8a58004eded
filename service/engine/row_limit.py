"""How many rows a step may have on a device that may have no memory for more.

    out of memory            the limit is halved: fewer images a step, which take turns
    many good steps          it grows by a sixteenth of its full size, up to that

Additive increase, multiplicative decrease, as of TCP's congestion window: what takes the memory away may go
again, and to find out costs one failed step, which is taken again with fewer rows.
"""

from __future__ import annotations

from typing import Final

__all__ = ["GOOD_STEPS", "RowLimit"]

GOOD_STEPS: Final = 200
"""Steps without a failure after which the limit grows."""
_GROWTHS: Final = 16


class RowLimit:
    """The limit of one engine; used by its thread."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.value = max_rows
        """Rows that the next step may have, at least 1; a single image is let through with two."""
        self._good_steps = 0

    def shrink(self, num_rows: int) -> None:
        """A step of so many rows did not fit: half of them are the limit now."""
        self.value = max(1, min(self.value, num_rows) // 2)
        self._good_steps = 0

    def count_good_step(self) -> None:
        """A step fitted; every `GOOD_STEPS` of them the limit grows, if it is not the full one."""
        if self.value == self.max_rows:
            return
        self._good_steps += 1
        if self._good_steps == GOOD_STEPS:
            self.value = min(self.max_rows, self.value + max(1, self.max_rows // _GROWTHS))
            self._good_steps = 0
