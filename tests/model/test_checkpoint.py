"""If this fails, a killed training run loses work or resumes from garbage."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_newest_state, save_state

CPU = torch.device("cpu")


def test_load_newest_state_of_an_empty_folder_is_none(tmp_path: Path) -> None:
    assert load_newest_state(tmp_path / "absent", CPU) is None


def test_save_state_round_trips_and_keeps_the_newest(tmp_path: Path) -> None:
    for images in (100, 2_000, 300):
        save_state(tmp_path, images, {"images_seen": images, "w": torch.full((2,), float(images))}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "state-000000000300.pt",
        "state-000000002000.pt",
    ]
    state = load_newest_state(tmp_path, CPU)
    assert state is not None
    assert state["images_seen"] == 2_000
    assert state["w"].tolist() == [2_000.0, 2_000.0]


@pytest.mark.parametrize("kept_share", [0.0, 0.5, 0.99], ids=["empty", "half", "end-missing"])
def test_load_newest_state_falls_back_past_a_truncated_file(
    tmp_path: Path, kept_share: float, caplog: pytest.LogCaptureFixture
) -> None:
    save_state(tmp_path, 1, {"images_seen": 1})
    newest = save_state(tmp_path, 2, {"images_seen": 2, "w": torch.zeros(1000)})
    newest.write_bytes(newest.read_bytes()[: int(kept_share * newest.stat().st_size)])
    state = load_newest_state(tmp_path, CPU)
    assert state is not None
    assert state["images_seen"] == 1
    assert "damaged" in caplog.text


def test_an_interrupted_save_leaves_no_state_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1, {"images_seen": 1})

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path, 2, {"images_seen": 2})
    monkeypatch.undo()
    state = load_newest_state(tmp_path, CPU)
    assert state is not None
    assert state["images_seen"] == 1
