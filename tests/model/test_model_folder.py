"""If this fails, a model that is served is half replaced when an export or a conversion ends midway."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from model.model_folder import staged_entries


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in (
        "transformer/old",
        "guidance_transformer/old",
        "vae/old",
        "model_index.json",
        "preview.json",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    return folder


def _write(staging: Path, *, with_index: bool) -> None:
    (staging / "transformer").mkdir()
    (staging / "transformer" / "new").write_text("after")
    if with_index:
        (staging / "model_index.json").write_text("after")


def test_staged_entries_replace_whole_entries_and_leave_others(folder: Path) -> None:
    with staged_entries(folder) as staging:
        _write(staging, with_index=True)
    others = {"vae/old": "before", "preview.json": "before"}
    assert _contents(folder) == others | {"transformer/new": "after", "model_index.json": "after"}


def test_staged_entries_leave_the_guidance_network_that_a_kept_index_names(folder: Path) -> None:
    with staged_entries(folder) as staging:
        _write(staging, with_index=False)
    assert _contents(folder)["guidance_transformer/old"] == "before"


@pytest.mark.parametrize(
    "error", [OSError("no space left"), SafetensorError("no space left"), KeyboardInterrupt()], ids=repr
)
def test_staged_entries_that_are_broken_off_change_nothing(folder: Path, error: BaseException) -> None:
    before = _contents(folder)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError

    def broken_off() -> None:
        with staged_entries(folder) as staging:
            _write(staging, with_index=True)
            raise error

    with pytest.raises(expected):
        broken_off()
    assert _contents(folder) == before
