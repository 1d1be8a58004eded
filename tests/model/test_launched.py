"""If this fails, processes of torchrun do one another's work, or speak all at once."""

from __future__ import annotations

import pytest

from model.launched import launched_local_rank, launched_local_size, launched_rank, launched_world_size

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _launched() -> tuple[int, int, int, int]:
    return launched_rank(), launched_world_size(), launched_local_rank(), launched_local_size()


def test_launched_is_what_torchrun_says_or_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    assert _launched() == (0, 1, 0, 1)
    for name, value in zip(_NAMES, ("5", "8", "1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert _launched() == (5, 8, 1, 4)


@pytest.mark.parametrize("value", ["", "two", "-1"])
def test_launched_refuses_what_is_no_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ValueError, match=f"WORLD_SIZE: '{value}' in the environment; torchrun's number is"):
        launched_world_size()
