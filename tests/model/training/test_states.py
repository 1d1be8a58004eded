"""If this fails, a killed training run loses work or resumes from garbage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.training.states import FACTS_FILE, SavedState, StateFolder, load_tensors, newest_state, read_state
from model.training.world import World

WORLD = World(device=torch.device("cpu"))

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as `train` does


def _tensors(value: float = 0.0) -> dict[str, Tensor]:
    return {"w": torch.full((300,), value), "b": torch.full((), value)}


def _save(folder: Path, *counts: int, keep: int = 9, keep_every: int = 0) -> None:
    states = StateFolder(folder, WORLD, keep=keep, keep_every=keep_every)
    for images in counts:
        states.save(images, _tensors(float(images)), {"run": images})


def _newest(folder: Path) -> SavedState:
    state = newest_state(folder, WORLD)
    assert state is not None
    return state


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_state_of_no_folder_is_none(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "absent", WORLD) is None


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_save_round_trips(tmp_path: Path, asynchronous: bool) -> None:
    states = StateFolder(tmp_path, WORLD, asynchronous=asynchronous)
    live = _tensors(7.0)
    states.save(8, live, {"run": "this"})
    live["w"].zero_()  # the next step
    states.finish()
    state, loaded = _newest(tmp_path), _tensors()
    load_tensors(state, loaded)
    assert (state.images_seen, state.facts["run"], state.facts["world_size"]) == (8, "this", 1)
    assert float(loaded["w"].mean()) == 7.0
    assert _names(tmp_path) == ["state-000000000008"]


def test_save_keeps_the_newest_and_the_first_of_each_part(tmp_path: Path) -> None:
    _save(tmp_path, *range(10, 100, 10), keep=2, keep_every=25)
    assert _images(tmp_path) == [30, 50, 80, 90]


def _images(folder: Path) -> list[int]:
    return [int(name.removeprefix("state-")) for name in _names(folder) if name.startswith("state-")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_states_without_finite_gradients_never_push_out_those_before(tmp_path: Path, keep: int) -> None:
    _save(tmp_path, 10, 20, keep=keep)
    states = StateFolder(tmp_path, WORLD, keep=keep)
    for images in (30, 40, 50):
        states.save(images, _tensors(), {}, healthy=False)
    assert _images(tmp_path) == ([10, 20, 50] if keep == 3 else [20, 50])
    assert _newest(tmp_path).images_seen == 50
    state = newest_state(tmp_path, WORLD, healthy=True)
    assert state is not None
    assert state.images_seen == 20
    _save(tmp_path, 60, keep=keep)
    assert _images(tmp_path) == [10, 20, 60][3 - keep :]


def test_only_what_saving_frees_counts_as_room(tmp_path: Path) -> None:
    def needed(size: int) -> int:
        return StateFolder(tmp_path, WORLD, keep=2, keep_every=25).bytes_to_save(size)

    def put(name: str) -> None:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__0_0.distcp").write_bytes(b"x" * 100)

    assert needed(100) == 300
    put("state-000000000010")
    assert needed(100) == 200
    put("state-000000000030")  # the first of its 25: kept for good
    put("state-000000000020.damaged")
    assert needed(100) == 200
    for images in (11, 12, 31, 32):
        put(f"state-{images:012d}")
    assert needed(100) == 100
    put(".state-000000000033.tmp")
    assert needed(100) == 0


@pytest.mark.parametrize("kept_share", [0.0, 0.5, 0.99], ids=["empty", "half", "end-missing"])
def test_newest_state_falls_back_past_a_truncated_one(
    tmp_path: Path, kept_share: float, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1, 2)
    (file,) = (tmp_path / "state-000000000002").glob("*.distcp")
    file.write_bytes(file.read_bytes()[: int(kept_share * file.stat().st_size)])
    assert _newest(tmp_path).images_seen == 1
    assert "damaged" in caplog.text
    assert _names(tmp_path) == ["state-000000000001", "state-000000000002.damaged"]
    _save(tmp_path, 2)
    assert _newest(tmp_path).images_seen == 2


@pytest.mark.parametrize("file", [".metadata", FACTS_FILE, "__0_0.distcp"])
def test_newest_state_finds_what_is_missing_or_garbage(tmp_path: Path, file: str) -> None:
    _save(tmp_path, 1, 2, 3)
    (tmp_path / "state-000000000003" / file).unlink()
    path = tmp_path / "state-000000000002" / file
    path.write_bytes(b"x" * path.stat().st_size)
    assert _newest(tmp_path).images_seen == 1


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        '{"version": 2}',
        '{"version": 2, "metadata_sha256": "", "files": [], "images_seen": 2}',
    ],
)
def test_newest_state_takes_other_json_for_damage(tmp_path: Path, content: str) -> None:
    _save(tmp_path, 1, 2)
    (tmp_path / "state-000000000002" / FACTS_FILE).write_text(content)
    assert _newest(tmp_path).images_seen == 1


def test_newest_state_finds_a_flipped_bit(tmp_path: Path) -> None:
    _save(tmp_path, 1, 7)
    (file,) = (tmp_path / "state-000000000007").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((4,), 7.0).numpy().tobytes()) + 64] ^= 1
    file.write_bytes(content)
    assert _newest(tmp_path).images_seen == 1


def test_parts_of_a_state_together_are_all_of_it(tmp_path: Path) -> None:
    _save(tmp_path, 7)
    folder = tmp_path / "state-000000000007"
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((4,), 7.0).numpy().tobytes()) + 64] ^= 1
    file.write_bytes(content)
    assert [read_state(folder, part=part, parts=2) is None for part in range(2)].count(True) == 1


def test_newest_state_refuses_another_version(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    path = tmp_path / "state-000000000001" / FACTS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))
    with pytest.raises(ValueError, match="version 9 of a saved state; 2 is accepted"):
        newest_state(tmp_path, WORLD)
    (tmp_path / "state-000000000001.pt").touch()
    with pytest.raises(ValueError, match="states of version 1, single files; 2 is accepted"):
        newest_state(tmp_path, WORLD)


def test_load_tensors_refuses_another_shape(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"w has shape \(300,\); shape \(3,\) is accepted"):
        load_tensors(_newest(tmp_path), {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"v is missing; shape \(3,\) is accepted"):
        load_tensors(_newest(tmp_path), {"v": torch.zeros(3)})


def test_what_an_interrupted_save_left_is_no_state_and_is_cleared(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    left = tmp_path / ".state-000000000002.tmp"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert _newest(tmp_path).images_seen == 1
    _save(tmp_path, 2)
    assert not left.exists()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_a_save_that_fails_is_told_and_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    _save(tmp_path, 1)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full_disk)
    states = StateFolder(tmp_path, WORLD, asynchronous=asynchronous)

    def save() -> None:
        states.save(2, _tensors(2.0), {})
        states.finish()

    with pytest.raises(OSError, match=r"state-000000000002 could not be written \(rank 0: no space left"):
        save()
    assert _newest(tmp_path).images_seen == 1
