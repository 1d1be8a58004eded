"""`lamamba train` and `export`: if this fails, a mistake is answered by tracebacks, one of each process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from model.cli import app
from model.training.export import read_metrics
from model.training.run import Diverged
from model.training.world import RankLost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--config", "places-128", "batchsize=64"],
            "lamamba: batchsize: unknown field of a training run; did you mean batch_size or",
        ),
        (["train", "--config", "places-128", "batch_size=0"], "lamamba: batch_size: 0 given; an integer of"),
        (
            ["train", "--config", "places-128", "network.hiden_size=64"],
            "lamamba: hiden_size: unknown field of the network; did you mean hidden_size or",
        ),
        (["export", "absent", "model"], "lamamba: run: absent given; a run's folder with saved states is"),
        (["export", "absent", "model", "--metrics", "absent.json"], "lamamba: metrics: absent.json cannot"),
    ],
    ids=["field", "value", "network", "run", "metrics"],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_one_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, ["train", "--config", "places-128", "batch_size=0"])
    assert (result.exit_code, result.output) == (2, "")


@pytest.mark.parametrize("error", [Diverged("it diverged"), RankLost("rank 1 is gone")], ids=["nan", "rank"])
def test_a_run_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("model.training.run.train", fail)
    result = CliRunner().invoke(app, ["train", "--config", "places-128"])
    assert (result.exit_code, result.stderr) == (1, f"lamamba: {error}\n")


def test_a_cards_figures_are_those_of_an_evaluation_with_their_errors(tmp_path: Path) -> None:
    rows = [
        {"metric": "FID-50K", "value": 6.1234567, "standard_error": 0.0343, "images": "samples"}
        | {"guidance_scale": 1.5},
        {"metric": "Recall", "value": 0.64, "images": "samples", "guidance_scale": 1.0},
        {"metric": "FID-50K", "value": 1.5, "standard_error": 0.25, "images": "other.npz"},
    ]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"date": "today", "metrics": rows}))
    assert read_metrics(path) == {
        "FID-50K, samples at guidance 1.5": "6.1235 ± 0.034",
        "Recall, samples at guidance 1": "0.64",
        "FID-50K, other.npz": "1.5 ± 0.25",
    }


@pytest.mark.parametrize("metrics", [5, [1], [{"metric": "FID"}]], ids=["number", "numbers", "no value"])
def test_metrics_that_no_evaluation_wrote_are_named(tmp_path: Path, metrics: Any) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"metrics": metrics}))
    with pytest.raises(ValueError, match=r"metrics: .*evaluation\.json has metrics that no evaluation wrote"):
        read_metrics(path)
    path.write_text(json.dumps({"FID": 2.5, "note": "mine", "list": [1]}))
    assert read_metrics(path) == {"FID": 2.5, "note": "mine"}
