"""If this fails, a killed training run loses work or resumes from garbage."""

from pathlib import Path

import pytest
import torch

from model.autoencoder_training.states import load_newest_state, save_state


def test_load_newest_state_of_an_empty_folder_is_none(tmp_path: Path) -> None:
    assert load_newest_state(tmp_path / "absent") is None


def test_save_state_round_trips_and_keeps_the_newest(tmp_path: Path) -> None:
    for images in (100, 2_000, 300):
        save_state(tmp_path, images, {"images_seen": images, "w": torch.full((2,), float(images))}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "state-000000000300.pt",
        "state-000000002000.pt",
    ]
    state = load_newest_state(tmp_path)
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
    state = load_newest_state(tmp_path)
    assert state is not None
    assert state["images_seen"] == 1
    assert "damaged" in caplog.text
    assert "weights_only" not in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".damaged"] == [
        "state-000000000002.pt.damaged"
    ]


def test_save_state_after_damaged_ones_keeps_what_it_wrote(tmp_path: Path) -> None:
    """The damaged ones count more images than the run that starts anew."""
    for images in (100, 200):
        save_state(tmp_path, images, {"images_seen": images}).write_bytes(b"garbage")
    assert load_newest_state(tmp_path) is None
    assert save_state(tmp_path, 8, {"images_seen": 8}).is_file()
    state = load_newest_state(tmp_path)
    assert state is not None
    assert state["images_seen"] == 8


@pytest.mark.parametrize("keep", [1, 2])
def test_save_state_never_removes_the_file_just_written(tmp_path: Path, keep: int) -> None:
    for images in (100, 200, 8):
        path = save_state(tmp_path, images, {"images_seen": images}, keep=keep)
        assert path.is_file()
    assert len(list(tmp_path.iterdir())) == keep


def test_load_newest_state_does_not_blame_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_state(tmp_path, 1, {"w": torch.zeros(1000)})

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as context:
        context.setattr(torch, "load", out_of_memory)
        with pytest.raises(RuntimeError, match="not enough memory"):
            load_newest_state(tmp_path)
    assert path.is_file()


def test_load_newest_state_finds_a_flipped_byte(tmp_path: Path) -> None:
    save_state(tmp_path, 1, {"images_seen": 1})
    newest = save_state(tmp_path, 2, {"w": torch.full((1000,), 7.0)})
    content = bytearray(newest.read_bytes())
    content[content.index(torch.full((4,), 7.0).numpy().tobytes()) + 64] ^= 1
    newest.write_bytes(content)
    state = load_newest_state(tmp_path)
    assert state == {"images_seen": 1}


def test_an_interrupted_save_leaves_no_state_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1, {"images_seen": 1})

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path, 2, {"images_seen": 2})
    monkeypatch.undo()
    state = load_newest_state(tmp_path)
    assert state is not None
    assert state["images_seen"] == 1
