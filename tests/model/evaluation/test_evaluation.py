"""If this fails, a model's figures are wrong, incomplete or cannot be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from model.data.places import RESERVED_VIEW_IDS, Places
from model.evaluation.command import evaluate_command
from model.evaluation.config import EvaluationConfig
from model.evaluation.evaluation import Evaluation, evaluate_file
from model.evaluation.sources import NpzImages
from model.lock_file import locked
from model.pipeline import LaMambaPipeline
from tests.extractors import MeanColour, TinyInception
from tests.tiny_model import save_autoguided_model, save_tiny_model

LABELS = ("red", "blue")


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
        extractors=[MeanColour()],
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
        ".lock",
        "evaluation.json",
        "grid.png",
        "guidance.png",
        "judge.safetensors",
        "nearest.png",
        "real.png",
        "samples-cfg1.json",
        "samples-cfg1.npz",
        "samples-cfg2.json",
        "samples-cfg2.npz",
    ]
    names = ["Frechet distance (mean colour)-8", "Precision (mean colour)", "Recall (mean colour)"]
    assert [row["metric"] for row in report["metrics"]] == 3 * names
    floor, reconstructions, samples = report["metrics"][::3]
    assert 0 < floor["value"] < reconstructions["value"]
    assert 0 < samples["standard_error"] < samples["value"]
    assert samples == {
        "metric": "Frechet distance (mean colour)-8",
        "value": samples["value"],
        "standard_error": samples["standard_error"],
        "num_images": 8,
        "reference": {
            "name": f"places, reserved views from {RESERVED_VIEW_IDS}",
            "hash": places.digest[:12],
            "num_images": 8,
        },
        "extractor": {"name": "mean colour", "details": "3 means", "weights": "none"},
        "images": "samples",
        "weights": pipeline.weights_hash,
        "autoencoder": pipeline.autoencoder.weights_hash[:12],
        "dtype": "float32",
        "resolution": 16,
        "classes": "balanced",
        "guidance_scale": 2.0,
        "sampler": "dpm++",
        "num_inference_steps": 2,
        "seed": 0,
    }
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
    for part in ("metrics", "class_accuracy", "judge", "nearest"):
        assert first[part] == again[part]
    assert not (tmp_path / "again" / "judge.safetensors").exists()


def test_a_wrong_judge_is_refused_before_samples_are_made(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path
) -> None:
    (tmp_path / "judge.safetensors").write_bytes(b"no judge")
    with pytest.raises(ValueError, match=r"judge: .* given; the judge\.safetensors of an earlier evaluation"):
        _evaluate(pipeline, places, tmp_path / "new", judge_file=tmp_path / "judge.safetensors")
    assert not list((tmp_path / "new").glob("samples*"))


def test_evaluation_goes_on_with_what_an_interrupted_one_made(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples and judge are not made twice, but another judge where another is asked for."""

    def again(*args: object, **fields: object) -> None:
        raise AssertionError("made twice")

    first = _evaluate(pipeline, places, tmp_path)
    monkeypatch.setattr("model.evaluation.evaluation.train_judge", again)
    monkeypatch.setattr(LaMambaPipeline, "generate", again)
    assert _evaluate(pipeline, places, tmp_path)["metrics"] == first["metrics"]
    with pytest.raises(AssertionError, match="made twice"):
        _evaluate(pipeline, places, tmp_path, judge_views=9)


def test_interrupted_evaluation_keeps_what_it_measured(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "_show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(pipeline, places, tmp_path)
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["metrics"]) == 3 * 4


def test_a_folder_is_one_evaluations_until_that_is_over(
    pipeline: LaMambaPipeline, places: Places, tmp_path: Path
) -> None:
    with locked(tmp_path / ".lock") as is_ours:
        assert is_ours
        with pytest.raises(ValueError, match=r"output_dir: .* is being written to by another evaluation"):
            _evaluate(pipeline, places, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_evaluation_refuses_a_model_of_other_classes(
    pipeline: LaMambaPipeline, tmp_path: Path, places: Places
) -> None:
    other = Places(labels=("a", "b"), panoramas=[np.zeros((8, 16, 3), np.uint8)] * 2, class_ids=(0, 1))
    with pytest.raises(
        ValueError, match="model: tiny has the classes red, blue; accepted is a model of the 2"
    ):
        Evaluation(pipeline, _config(), places=other, extractors=[MeanColour()], output_dir=tmp_path)


def test_evaluation_against_a_file_measures_what_adm_measures(
    pipeline: LaMambaPipeline, tmp_path: Path
) -> None:
    """And no more: no judge, no pictures."""
    reference = tmp_path / "reference.npz"
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    statistics = {"mu": np.full(3, 127.0), "sigma": np.eye(3), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    np.savez(reference, arr_0=images, **statistics)
    evaluation = Evaluation(
        pipeline,
        _config(guidance_scales=(1.0,), classes="random"),
        extractors=[TinyInception(), MeanColour()],
        output_dir=tmp_path / "out",
        reference=NpzImages(reference),
    )
    report = evaluation.run()
    rows = {row["metric"]: row for row in report["metrics"]}
    assert list(rows) == [
        "FID-8",
        "sFID-8",
        "Inception Score",
        "Precision",
        "Recall",
        "Frechet distance (mean colour)-8",
        "Precision (mean colour)",
        "Recall (mean colour)",
    ]
    assert "num_images" not in rows["FID-8"]["reference"] or rows["FID-8"]["reference"]["num_images"] is None
    assert rows["Precision"]["reference"]["num_images"] == 12
    assert "reference" not in rows["Inception Score"]
    assert rows["FID-8"]["value"] != rows["Frechet distance (mean colour)-8"]["value"]
    assert "pictures" not in report

    again = evaluate_file(
        NpzImages(tmp_path / "out" / "samples-cfg1.npz"),
        NpzImages(reference),
        extractors=[TinyInception(), MeanColour()],
        output_dir=tmp_path / "again",
    )
    values = [(row["metric"], row["value"]) for row in again["metrics"]]
    assert values == [(row["metric"], row["value"]) for row in report["metrics"]]
    assert again["metrics"][0]["images"] == "samples-cfg1.npz"
    assert again["metrics"][0]["classes"] == "random"
    assert again["metrics"][0]["weights"] == pipeline.weights_hash


@pytest.mark.parametrize(
    ("images", "features", "message"),
    [
        (3, 3, "reference: 3 images given; at least 4 are accepted"),
        (12, 5, r"reference: reference\.npz has statistics of 5 features; those of Inception-v3, 3, are acc"),
    ],
)
def test_a_reference_that_no_metric_can_use_is_refused_before_the_images_are_made(
    pipeline: LaMambaPipeline, tmp_path: Path, images: int, features: int, message: str
) -> None:
    statistics = {"mu": np.zeros(features), "sigma": np.eye(features), "mu_s": np.zeros(4)}
    statistics |= {"sigma_s": np.eye(4)}
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.zeros((images, 16, 16, 3), np.uint8), **statistics)
    with pytest.raises(ValueError, match=message):
        Evaluation(
            pipeline,
            _config(guidance_scales=(1.0,)),
            extractors=[TinyInception()],
            output_dir=tmp_path / "out",
            reference=NpzImages(reference),
        )


def test_fid_of_fewer_images_than_features_is_refused(pipeline: LaMambaPipeline, tmp_path: Path) -> None:
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.zeros((12, 16, 16, 3), np.uint8))
    extractor = TinyInception()
    extractor.num_features = 9  # type: ignore[misc]  # of this one alone
    arguments: dict[str, Any] = {"extractors": [extractor], "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="num: 8 images given; at least 9 are accepted with Inception-v3"):
        Evaluation(pipeline, _config(), reference=NpzImages(reference), **arguments)
    extractor.num_features = 13  # type: ignore[misc]
    with pytest.raises(ValueError, match="reference: 12 images given; at least 13 are accepted"):
        Evaluation(pipeline, _config(num=20), reference=NpzImages(reference), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 1001}, "num_inference_steps: 1001 given; tiny accepts 1 to 1000"),
        ({"guidance_interval": (5, 2000)}, "guidance_interval: "),
        ({"classes": "random"}, "classes: random given; balanced is accepted with places"),
    ],
)
def test_evaluation_names_what_does_not_fit_the_model(
    fields: dict[str, Any], message: str, pipeline: LaMambaPipeline, places: Places, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(pipeline, _config(**fields), places=places, extractors=[MeanColour()], output_dir=tmp_path)


def test_evaluation_compiles_and_counts_both_networks_of_an_autoguided_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = LaMambaPipeline.load(save_autoguided_model(tmp_path, depths=(1, 1, 1, 0)), device="cpu")
    networks = [pipeline.network, pipeline.guidance_network]
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda network, **fields: compiled.append(network))
    report = Evaluation(pipeline, _config(compile=True), extractors=[], output_dir=tmp_path / "out").run()
    assert compiled == networks
    counts = [sum(p.numel() for p in network.parameters()) for network in networks if network is not None]
    assert (len(counts), report["model"]["parameters"]) == (2, sum(counts))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num": 3}, "num: 3 given; at least 4 is accepted"),
        ({"sampler": "euler"}, r"sampler: euler given; one of ddpm, ddim, dpm\+\+ is accepted"),
        ({"classes": "all"}, "classes: all given; one of balanced, random is accepted"),
        ({"seed": 2**63}, "seed: 9223372036854775808 given; at most 9223372036854775807"),
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
        ([], "model, samples: exactly one of the two is accepted"),
        (["--samples", "x.npz"], "reference: places given; with samples an .npz or a folder is accepted"),
        (["--samples", "x.npz", "--reference", "y"], "x.npz: no such file; an .npz with images in arr_0"),
        (["--model", "x", "--sampler", "euler"], "sampler: euler given"),
        (["--samples", "x.npz", "--reference", "y", "--generate-only"], "generate_only: given with samples"),
        (
            ["--model", "x", "--reference", "y", "--judge", "j"],
            "judge: j given; it is accepted where",
        ),
        (["--samples", "x.npz", "--reference", "y", "--judge", "j"], "judge: j given"),
        (["--model", "x", "--generate-only", "--judge", "j"], "judge: j given"),
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
