"""A model of random weights is one that the pipeline takes, of the size that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from model.benchmark.command import bench_app
from model.pipeline import LaMambaPipeline


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(bench_app, ["random-model", *arguments, "--device", "cpu"])
    return result.exit_code, result.output


def test_a_model_that_makes_images_of_its_resolution(tmp_path: Path) -> None:
    folder = tmp_path / "random"
    assert run(str(folder), "--preset", "tiny", "--resolution", "64") == (0, f"{folder}\n")
    pipeline = LaMambaPipeline.load(folder, device="cpu")
    image = pipeline.generate([3], seeds=[0], num_inference_steps=2)
    assert (pipeline.name, pipeline.resolution, pipeline.num_classes) == ("random", 64, 10)
    assert image.shape == (1, 64, 64, 3)
    assert np.ptp(image) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolution", "100"), "resolution: 100 given; multiples of 8"),
        (("--resolution", "24"), "sample_size"),
        (("--preset", "huge"), "preset"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, output = run(str(tmp_path / "random"), "--preset", "tiny", *arguments)
    assert code == 2
    assert message in output
    assert not (tmp_path / "random").exists()


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    code, output = run(str(tmp_path), "--preset", "tiny")
    assert code == 2
    assert "exists" in output
