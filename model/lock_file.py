"""A file that one process at a time holds."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked", "taken"]


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process holds the file, which is made, while the block runs; False where another has it.

    A process loses it with its end, however that comes. On a file system without locks everybody holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def taken(folder: Path) -> ValueError:
    """What to refuse a run with whose folder is held by another."""
    return ValueError(
        f"output_dir: {folder} belongs to a run that is not over, of another process; wait for its end, or "
        "choose another folder"
    )
