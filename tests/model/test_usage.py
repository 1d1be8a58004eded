"""If this fails, a full disk or a mistake is answered by a traceback, or a defect without one."""

from __future__ import annotations

import errno

import pytest
import torch
import typer

from model.usage import usage_errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("num: 0 given; 1 or more is accepted"), "num: 0 given; 1 or more is accepted"),
        (OSError(errno.ENOSPC, "No space left on device", "a.npz"), "a.npz: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("a state could\nnot be written"), "a state could not be written"),
    ],
    ids=["value", "file", "no-file", "text"],
)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], error: Exception, line: str) -> None:
    with pytest.raises(typer.Exit) as caught, usage_errors():
        raise error
    assert (caught.value.exit_code, capsys.readouterr().err) == (2, f"lamamba: {line}\n")


def test_one_of_several_processes_tells_a_mistake_and_each_what_its_system_refuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit), usage_errors(quiet=True):
        raise ValueError("num: 0 given; 1 or more is accepted")
    assert not capsys.readouterr().err
    with pytest.raises(typer.Exit), usage_errors(quiet=True):
        raise OSError("no route to this disk")
    assert capsys.readouterr().err == "lamamba: no route to this disk\n"


def test_a_device_without_memory_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, usage_errors():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")
    line = (
        "the device has no memory for that; less at once may fit (CUDA out of memory. Tried to allocate 2.00"
    )
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == f"lamamba: {line} GiB.)\n"


@pytest.mark.parametrize("error", [RuntimeError("a defect"), BrokenPipeError()], ids=["defect", "pipe"])
def test_usage_errors_leave_others_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), usage_errors():
        raise error
