"""If this fails, Ctrl-C or a scheduler's SIGTERM loses work, or a program cannot be stopped at all."""

from __future__ import annotations

import signal
import threading

import pytest

from model.stop_request import StopRequest


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)],
    ids=["int", "term", "usr1"],
)
def test_stop_request_notes_the_first_signal(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        assert stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.received is number
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_aborts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012  # both signals belong to the case
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_request_that_is_repeated_is_one_request() -> None:
    """torchrun's agent tells its processes what Slurm has told them already."""
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.received is signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_stop_request_outside_the_main_thread_notes_nothing() -> None:
    received: list[object] = []

    def run() -> None:
        with StopRequest() as stop:
            received.append(stop.received)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert received == [None]
    assert signal.getsignal(signal.SIGINT) is before


def test_stop_request_ends_at_once_where_nothing_is_lost() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, StopRequest(at_once=True):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
