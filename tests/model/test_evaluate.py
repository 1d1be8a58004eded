"""If this fails, a model's figures are wrong, incomplete or cannot be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from model.data.places import RESERVED_VIEW_IDS, Places
from model.evaluate import Evaluation
from model.evaluation.command import evaluate_command
from model.evaluation.config import EvaluationConfig
from model.evaluation.sources import balanced_view_ids, sampled_images, views
from model.pipeline import LaMambaPipeline
from tests.tiny_model import save_tiny_model

LABELS = ("red", "blue")


class MeanColour:
    """Features that are the image's mean colour."""

    name, weights_hash, device = "mean colour", "none", torch.device("cpu")

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(1, 2))


@pytest.fixture(scope="module")
def places() -> Places:
    generator = np.random.default_rng(0)
    panoramas = [generator.integers(0, 80, (32, 64, 3), dtype=np.uint8) for _ in LABELS]
    panoramas[0][..., 0] += 150
    panoramas[1][..., 2] += 150
    return Places(labels=LABELS, panoramas=panoramas, class_ids=(0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), labels=LABELS, depths=(1, 1, 1, 0))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LaMambaPipeline:
    return LaMambaPipeline.load(folder, device="cpu")


def _config(**fields: Any) -> EvaluationConfig:
    small = {"num": 8, "num_inference_steps": 2, "num_rows": 6, "judge_views": 8, "num_training_views": 5}
    return EvaluationConfig(**{**small, "guidance_scales": (1.0, 2.0), "images_per_class": 2, **fields})


def _evaluate(pipeline: LaMambaPipeline, places: Places, output_dir: Path, **fields: Any) -> dict[str, Any]:
    judge_file = fields.pop("judge_file", None)
    evaluation = Evaluation(
        pipeline,
        _config(**fields),
        places=places,
        extractor=MeanColour(),
        output_dir=output_dir,
        judge_file=judge_file,
    )
    return evaluation.run()


def test_evaluation_measures_everything_and_says_on_what(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path
) -> None:
    report = _evaluate(pipeline, places, tmp_path, distance_scales=(2.0,), num_per_scale=4)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json",
        "grid.png",
        "guidance.png",
        "judge.safetensors",
        "nearest.png",
        "real.png",
    ]
    floor, reconstructions, samples = report["distances"]
    assert 0 < floor["frechet_distance"] < reconstructions["frechet_distance"]
    assert (samples["images"], samples["guidance_scale"], samples["num_images"]) == ("samples", 2.0, 8)
    for distance in report["distances"]:
        assert {"extractor", "extractor_weights", "num_images", "num_reference_views"} <= set(distance)
    for key in ("weights", "autoencoder", "sampler", "num_inference_steps", "seed"):
        assert key in samples
    assert [a["num_images"] for a in report["class_accuracy"]] == [8, 8, 4, 8]
    assert report["judge"]["reserved_views"]["num_images"] == 8
    assert report["nearest"]["num_training_views"] == 5
    assert set(report["nearest"]["unseen_real_views"]) == {"features", "pixels"}


def test_evaluation_again_with_its_judge_gives_the_same_numbers(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path
) -> None:
    first = _evaluate(pipeline, places, tmp_path / "first")
    judge = tmp_path / "first" / "judge.safetensors"
    again = _evaluate(pipeline, places, tmp_path / "again", judge_file=judge)
    for part in ("distances", "class_accuracy", "judge", "nearest"):
        assert first[part] == again[part]
    assert not (tmp_path / "again" / "judge.safetensors").exists()


def test_interrupted_evaluation_keeps_what_it_measured(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "_pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(pipeline, places, tmp_path)
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["distances"]) == 4


def test_evaluation_refuses_a_model_of_other_classes(
    pipeline: LaMambaPipeline, tmp_path: Path, places: Places
) -> None:
    other = Places(labels=("a", "b"), panoramas=[np.zeros((8, 16, 3), np.uint8)] * 2, class_ids=(0, 1))
    with pytest.raises(
        ValueError, match="model: tiny has the classes red, blue; accepted is a model of the 2"
    ):
        Evaluation(pipeline, _config(), places=other, extractor=MeanColour(), output_dir=tmp_path)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampled_images_are_balanced_and_whatever_the_batch(
    pipeline: LaMambaPipeline, guidance_scale: float
) -> None:
    def sample(num_rows: int, fixed_shapes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(
            sampled_images(
                pipeline,
                7,
                guidance_scale=guidance_scale,
                num_inference_steps=2,
                sampler="dpm++",
                seed=5,
                num_rows=num_rows,
                fixed_shapes=fixed_shapes,
            )
        )
        return torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches])

    pixels, labels = sample(num_rows=16, fixed_shapes=False)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    padded, _ = sample(num_rows=6, fixed_shapes=True)
    assert padded.shape == (7, 16, 16, 3)
    assert (pixels.int() - padded.int()).abs().max() <= 1  # batches of other sizes round differently


def test_views_are_reserved_ones_and_balanced_ids_go_through_the_classes(places: Places) -> None:
    ids = balanced_view_ids(places, per_class=3)
    assert places.views(ids).class_ids.tolist() == [0, 1, 0, 1, 0, 1]
    assert (ids >= RESERVED_VIEW_IDS).all()
    pixels, labels = next(views(places, RESERVED_VIEW_IDS, 4, 16))
    images, expected = places.render(RESERVED_VIEW_IDS + torch.arange(4), 16)
    assert torch.equal(labels, expected)
    assert (pixels.movedim(-1, 1).float() / 127.5 - 1 - images).abs().max() <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num": 1}, "num: 1 given; at least 2 is accepted"),
        ({"guidance_scales": (0.5,)}, r"guidance_scales: \[0.5\] given"),
        ({"guidance_scales": (2.0, 2.0)}, "guidance_scales: "),
        ({"guidance_scales": (float("nan"),)}, "guidance_scales: "),
        (
            {"distance_scales": (7.0,)},
            "distance_scales: 7 given; those of guidance_scales are accepted: 1, 2",
        ),
        ({"num_per_scale": 0}, "num_per_scale: 0 given; at least 1 is accepted"),
    ],
)
def test_config_names_what_it_does_not_accept(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "./nowhere: no such model folder"),
        (["--model", "x", "--guidance-scales", "1,two"], "guidance_scales: '1,two' given; numbers"),
    ],
)
def test_command_answers_a_mistake_with_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    app = Typer()
    app.command()(evaluate_command)
    result = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
