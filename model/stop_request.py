"""Ctrl-C, SIGTERM and SIGUSR1 as a flag that a loop reads where its state is whole.

SIGTERM is what Kubernetes, torchrun and Slurm send, SIGUSR1 what Slurm is often told to send before it.

Raised as an exception, an interrupt could fall between an update of the weights and the count of its images.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Inside `with`, the first of the signals is only noted. A Ctrl-C after it does what it did before;
    others are the same request again: who ends a program of many processes may tell each of them twice.

    Outside the main thread, which alone receives signals, nothing is ever noted.

    Attributes:
        received: the signal, or None as long as there was none.
        at_once: whether a signal ends the program where it comes, by SystemExit: set as long as there is
            nothing to lose.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*_SIGNALS)

    @property
    def exit_code(self) -> int:
        """What a shell reports of a program that this signal ended: 130, 143 or 138; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        self._restore(signal.SIGINT)
        if self.at_once:
            raise SystemExit(self.exit_code)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in self._previous.keys() & set(numbers):
            handler = self._previous.pop(number)
            # None: the handler was set outside Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
