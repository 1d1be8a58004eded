"""If this fails, a run's curves have steps twice, or nowhere to be seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.progress import progress_display
from model.training.config import TrainConfig
from model.training.watch import Watch, peak_flops

VALUES = {"loss": 0.5, "mse": 0.4, "vb": 0.1, "grad_norm": 2.0}


def _watch(folder: Path, *, images_seen: int = 0, **fields: Any) -> Watch:
    config = TrainConfig(name="tiny", output_dir=str(folder), resolution=16, num_images=100, **fields)
    return Watch(
        config,
        progress_display(shown=False),
        images_seen=images_seen,
        full_speed=16.0,
        device=torch.device("cpu"),
    )


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The watch's time, which stands still at `now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("model.training.watch.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_record_tells_what_happened(tmp_path: Path, clock: SimpleNamespace) -> None:
    watch = _watch(tmp_path, tensorboard=False)
    clock.now += 2.0
    watch.record(8, VALUES | {"vb": float("nan")}, skipped_steps=1)
    watch.close()
    (record,) = _log(tmp_path)
    assert record["vb"] is None
    assert {name: record[name] for name in ("images", "loss", "skipped_steps")} == {
        "images": 8,
        "loss": 0.5,
        "skipped_steps": 1,
    }
    assert (record["images_per_second"], record["mfu"]) == (4.0, 0.25)


def test_a_grid_of_samples_leaves_the_speed_as_it_is(tmp_path: Path, clock: SimpleNamespace) -> None:
    watch = _watch(tmp_path, tensorboard=False)
    clock.now += 1.0  # 4 of the 8 images
    with watch.paused():
        clock.now += 50.0
        watch.picture(4, np.zeros((4, 4, 3), np.uint8))
    clock.now += 1.0
    watch.record(8, VALUES, skipped_steps=0)
    (record,) = _log(tmp_path)
    assert (record["images_per_second"], record["mfu"]) == (4.0, 0.25)


def test_a_resumed_run_takes_back_what_comes_again(tmp_path: Path) -> None:
    watch = _watch(tmp_path, tensorboard=False)
    for images in (8, 16, 24):
        watch.record(images, VALUES, skipped_steps=0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('null\n8\n{"loss": 0.5}\n{"images": null}\n')
        file.write('{"images": 32, "lo')  # where the process was killed
    _watch(tmp_path, images_seen=16, tensorboard=False).record(24, VALUES, skipped_steps=0)
    assert [record["images"] for record in _log(tmp_path)] == [8, 16, 24]


def test_tensorboard_gets_scalars_and_samples(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watch = _watch(tmp_path)
    watch.record(8, VALUES, skipped_steps=0)
    watch.picture(8, np.full((16, 16, 3), 200, np.uint8))
    watch.close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (8, 0.5)
    assert [image.step for image in events.Images("samples")] == [8]
    with Image.open(tmp_path / "samples" / "samples-000000000008.png") as image:
        assert image.getpixel((3, 3)) == (200, 200, 200)


def test_without_tensorboard_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with caplog.at_level("INFO"):
        _watch(tmp_path).record(8, VALUES, skipped_steps=0)
    assert "tensorboard is not installed (pip install 'lamamba[train]')" in caplog.text
    assert len(_log(tmp_path)) == 1


def test_wandb_gets_one_run_for_all_resumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(log=logged.append, finish=lambda: logged.append({"finished": True}))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=str))
    for images in (8, 16):
        watch = _watch(tmp_path, images_seen=images - 8, tensorboard=False, wandb="places")
        watch.record(images, VALUES, skipped_steps=0)
        watch.picture(images, np.zeros((4, 4, 3), np.uint8))
        watch.close()
    assert [call["project"] for call in calls] == ["places", "places"]
    assert calls[0]["id"] == calls[1]["id"]
    assert calls[0]["config"]["resolution"] == 16
    assert [(row["images"], row["loss"]) for row in logged if "loss" in row] == [(8, 0.5), (16, 0.5)]
    assert sum("samples" in row for row in logged) == sum("finished" in row for row in logged) == 2


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
