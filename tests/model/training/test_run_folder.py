"""If this fails, two runs in a folder remove each other's states, or one fails at its folder after hours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.training.run_folder import claimed_folder
from model.training.world import World

WORLD = World(device=torch.device("cpu"))


def test_a_folder_is_one_runs_until_that_is_over(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    with (
        claimed_folder(folder, WORLD),
        pytest.raises(ValueError, match=r"output_dir: .*tiny belongs to a run that is not over"),
        claimed_folder(folder, WORLD),
    ):
        pass
    with claimed_folder(folder, WORLD):
        assert folder.is_dir()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("run", r"output_dir: .*run is no folder and cannot be made .*File exists"),
        ("run/states", r"output_dir: .*states is a file; a run makes a folder of that name"),
        ("run/latents", r"output_dir: .*latents is a file; a run makes a folder of that name"),
        ("run/model", r"output_dir: .*model is a file; a run makes a folder of that name"),
    ],
)
def test_a_file_in_the_way_is_refused(tmp_path: Path, file: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(ValueError, match=message), claimed_folder(tmp_path / "run", WORLD):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with (
        pytest.raises(ValueError, match=r"output_dir: .* a folder that this user may write to is accepted"),
        claimed_folder(tmp_path, WORLD),
    ):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claimed_folder(tmp_path, WORLD):
        assert tmp_path.is_dir()
