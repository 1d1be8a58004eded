"""benchmarks/study.py: if this fails, runs are made twice or not at all, or a row is not what it says."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import study as module
from benchmarks.study import Run, Study, planned_runs
from benchmarks.study_report import RECIPES, draw, label, table
from model.evaluation.features import Features
from model.network.kinds import network_macs, network_parameters
from model.training.config import TrainConfig
from model.training.run import Diverged
from tests.tiny_model import save_tiny_model

EVALUATION = {"num": 20, "sampler": "dpm++", "num_inference_steps": 2}
CPU = torch.device("cpu")


def _runs(recipes: tuple[str, ...], **evaluation: Any) -> list[Run]:
    small = ["network.hidden_size=16", "network.num_heads=2"]
    return planned_runs(recipes, [0, 1], 1000, EVALUATION | evaluation, small)


class _Extractor:
    name, weights_hash, device = "mean colours", "0123", CPU

    def __call__(self, pixels: Tensor) -> Features:
        return Features(pooled=pixels.float().mean(dim=(1, 2)))  # (n, 3)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrainConfig]:
    """The runs that a fake of `train` was asked for; each takes two calls and ends in a tiny model."""
    asked: list[TrainConfig] = []
    labels = [f"class {i}" for i in range(21)]

    def train(config: TrainConfig, *, device: torch.device) -> Path | None:
        asked.append(config)
        folder = Path(config.output_dir)
        assert (folder / "latents").is_dir()
        if [other.output_dir for other in asked].count(config.output_dir) == 1:
            (folder / "states").mkdir()
            return None
        lines = [
            {"images": 400, "loss": 0.7, "images_per_second": 20.0},
            {"images": 1000, "loss": 0.5, "images_per_second": 10.0},
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return save_tiny_model(folder, labels)

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "EfficientNetLite2", lambda device: _Extractor())
    return asked


def test_the_study_goes_on_where_it_stopped_and_repeats_nothing(
    trained: list[TrainConfig], tmp_path: Path
) -> None:
    runs, results = _runs(RECIPES[:1])[:1], tmp_path / "results" / "study.json"

    def go_on() -> int:
        return Study(runs, tmp_path / "work", results, device=CPU).go_on(time.monotonic() + 1000)

    assert [go_on() for _ in range(3)] == [1, 0, 0]
    assert len(trained) == 2
    rows = json.loads(results.read_text())["rows"]
    assert [row["key"] for row in rows if row["recipe"] == RECIPES[0]] == [run.key for run in runs]
    assert [row["recipe"] for row in rows].count("reserved-views") == 1
    row = next(row for row in rows if row["recipe"] == RECIPES[0])
    assert (row["loss"], row["images_per_second"], row["images"]) == (0.5, 15.0, 1000)
    assert row["training_seconds"] == 400 / 20 + 600 / 10
    assert row["frechet_distance"] > 0
    assert row["standard_error"] > 0
    assert row["parameters"] == network_parameters(runs[0].architecture)
    assert row["gmacs"] == pytest.approx(network_macs(runs[0].architecture) / 1e9, abs=1e-4)
    assert not list((tmp_path / "work").glob("*/states"))
    # Another number of samples is another row of the same trained model.
    more = _runs(RECIPES[:1], num=30)[:1]
    assert Study(more, tmp_path / "work", results, device=CPU).go_on(time.monotonic() + 1000) == 0
    assert len(trained) == 2


def test_a_run_that_diverges_is_left_out_and_stays_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(config: TrainConfig, *, device: torch.device) -> None:
        raise Diverged(f"{config.name}: no finite gradients")

    monkeypatch.setattr(module, "train", train)
    study = Study(_runs(RECIPES[:1]), tmp_path, tmp_path / "study.json", device=CPU)
    assert study.go_on(time.monotonic() + 1000) == 2
    assert not study.rows


def test_nothing_is_started_without_time_for_it(trained: list[TrainConfig], tmp_path: Path) -> None:
    study = Study(_runs(RECIPES[:1]), tmp_path, tmp_path / "study.json", device=CPU)
    assert study.go_on(time.monotonic() + 30) == 2
    assert not trained


def test_runs_are_equal_but_for_network_and_seed() -> None:
    runs = planned_runs(RECIPES, [0, 1], 1000, EVALUATION, ["learning_rate=3e-4"])
    assert len({run.key for run in runs}) == len(runs) == 2 * len(RECIPES)
    own = ("name", "output_dir", "network", "seed")
    shared = [{name: value for name, value in run.fields.items() if name not in own} for run in runs]
    assert all(fields == shared[0] for fields in shared)
    assert shared[0]["data"] == shared[0]["autoencoder"] == "places"
    assert (shared[0]["learning_rate"], shared[0]["num_images"]) == (3e-4, 1000)
    assert runs[0].key == planned_runs(RECIPES[:1], [0], 1000, EVALUATION, ["learning_rate=3e-4"])[0].key
    with pytest.raises(ValueError, match="nets: unknown field of a training run"):
        planned_runs(RECIPES[:1], [0], 1000, EVALUATION, ["nets=1"])


def test_lengths_of_averages_are_measured_of_one_training(
    trained: list[TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[tuple[Path, float]] = []

    def export(run: Path, target: Path, *, sigma_rel: float) -> None:
        assert (run / "states").is_dir()
        exported.append((run, sigma_rel))
        shutil.copytree(run / "model", target)

    monkeypatch.setattr(module, "export_run", export)
    small = ["network.hidden_size=16", "network.num_heads=2"]
    lengths = {"sigma_rels": [0.05, 0.2]}
    with pytest.raises(ValueError, match=r"sigma_rel: 0.05 given; it is accepted with --set"):
        planned_runs(RECIPES[:1], [0], 1000, EVALUATION, small, **lengths)
    overrides = [*small, "ema_tracks=[0.05,0.1]", "snapshot_every=256"]
    runs = planned_runs(RECIPES[:1], [0], 1000, EVALUATION, overrides, **lengths)
    study = Study(runs, tmp_path / "work", tmp_path / "study.json", device=CPU)
    assert [study.go_on(time.monotonic() + 1000) for _ in range(2)] == [3, 0]
    assert len({config.output_dir for config in trained}) == 1
    (folder,) = {run for run, _ in exported}
    assert exported == [(folder, 0.05), (folder, 0.2)]
    labels = [label(row) for row in study.rows.values() if row["recipe"] == RECIPES[0]]
    setting = ", ".join([RECIPES[0], *overrides])
    assert labels == [setting, f"{setting}, sigma_rel 0.05", f"{setting}, sigma_rel 0.2"]


def _row(recipe: str, seed: int, distance: float, **facts: Any) -> dict[str, Any]:
    shared = {"key": f"{recipe}{seed}", "standard_error": 0.25, "parameters": 34e6, "gmacs": 3.2}
    shared |= {"images": 1000, "images_per_second": 900.0, "training_seconds": 90.0}
    return (
        {"recipe": recipe, "seed": seed, "frechet_distance": distance, "config": {"seed": seed}}
        | shared
        | facts
    )


def test_the_table_sets_seeds_side_by_side_and_names_what_is_missing(tmp_path: Path) -> None:
    rows = [
        _row("imagenet-256-s", 1, 22.0),
        _row("imagenet-256-s", 0, 20.0),
        _row("imagenet-256-b", 1, 10.0),
        {"key": "floor", "recipe": "reserved-views", "seed": None, "frechet_distance": 3.0}
        | {"standard_error": 0.1},
    ]
    text = table(rows, ["imagenet-256-s", "imagenet-256-dit-s-2"]).splitlines()
    assert text[2] == (
        "| imagenet-256-s | 1,000 | 34.00 | 3.20 | 20.00 ± 0.25, 22.00 ± 0.25 | 21.00 | 900 | 1.5 | 55.68 |"
    )
    assert text[3] == "| imagenet-256-dit-s-2 | not run yet | | | | | | | 68.40 |"
    assert "| 10.00 ± 0.25; seed 0 not run yet | 10.00 |" in text[4]
    assert text[5] == "| other reserved views | | | | 3.00 ± 0.10 | 3.00 | | | |"
    assert {line.count("|") for line in text} == {10}
    option = table([rows[0] | {"set": ["min_snr_gamma=5"]}]).splitlines()[2]
    assert option.startswith("| imagenet-256-s, min_snr_gamma=5 | 1,000 |")


def test_the_drawing_has_all_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [_row("imagenet-256-s", 0, 20.0), _row("imagenet-256-dit-s-2", 0, 30.0)]
    results = tmp_path / "study.json"
    results.write_text(json.dumps({"rows": rows}))
    draw(results, ["imagenet-256-s"])
    assert "imagenet-256-dit-s-2" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_one_network_have_a_table_alone(tmp_path: Path) -> None:
    """Their bubbles would lie on each other."""
    option = {"set": ["min_snr_gamma=5"], "config": {"min_snr_gamma": 5}}
    rows = [_row("imagenet-256-s", 0, 20.0), _row("imagenet-256-s", 0, 19.0) | option]
    results = tmp_path / "options.json"
    results.write_text(json.dumps({"rows": rows}))
    assert "min_snr_gamma=5" in draw(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["options.json", "options.md"]
