"""model/preview: if this fails, what people watch while an image is made is noise, or not their image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d
from typer.testing import CliRunner

from model.cli import app
from model.pipeline import LaMambaPipeline
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir
from model.preview import PREVIEW_FILE, PreviewMap, fit_preview_map, read_preview_map, write_preview_map
from tests.fakes import fake_pipeline

CHANNELS = 4


def some_map() -> PreviewMap:
    torch.manual_seed(0)
    return PreviewMap(weight=torch.randn(3, CHANNELS) / 4, bias=torch.randn(3) / 4)


def test_fit_finds_the_map_that_made_the_colours() -> None:
    made_by = some_map()
    latents = torch.randn(2, CHANNELS, 5, 7)
    colours = torch.einsum("oc,nchw->nohw", made_by.weight, latents) + made_by.bias[:, None, None]
    images = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)  # (2, 3, 40, 56)
    fitted, explained = fit_preview_map(latents, images)
    torch.testing.assert_close(fitted.weight, made_by.weight)
    torch.testing.assert_close(fitted.bias, made_by.bias)
    assert explained == pytest.approx(1.0)


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = some_map()
    assert read_preview_map(tmp_path, latent_channels=CHANNELS) is None
    write_preview_map(tmp_path, written)
    read = read_preview_map(tmp_path, latent_channels=CHANNELS)
    assert read is not None
    torch.testing.assert_close(read.weight, written.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(read.bias, written.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a preview map"),
        ("[]", "not a preview map"),
        ('{"weight": [[1]], "bias": "x"}', "not a preview map"),
        (json.dumps({"weight": [[0.0] * 3] * 3, "bias": [0.0] * 3}), r"\(3, 4\) and \(3,\) are accepted"),
    ],
    ids=["cut", "list", "text", "channels"],
)
def test_a_damaged_map_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / PREVIEW_FILE).write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_preview_map(tmp_path, latent_channels=CHANNELS)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_not_finite_is_grey() -> None:
    latents = torch.full((1, CHANNELS, 2, 2), torch.nan)
    assert torch.equal(some_map()(latents), torch.full((1, 2, 2, 3), 128, dtype=torch.uint8))


def test_a_pipeline_without_a_map_says_so() -> None:
    with pytest.raises(ValueError, match="`lamamba fit-previews` makes one"):
        replace(fake_pipeline(), preview_map=None).preview(torch.zeros(1, CHANNELS, 2, 2))


@pytest.mark.parametrize("resolution", PRETRAINED_RESOLUTIONS)
def test_the_shipped_maps_show_the_light_of_the_decoded_image(resolution: int) -> None:
    pipeline = LaMambaPipeline.load(default_model_dir(resolution), device="cpu")
    torch.manual_seed(0)
    latents = adaptive_avg_pool2d(torch.randn(1, CHANNELS, 4, 4), 8) * 2  # smooth: light varies in it
    preview = pipeline.preview(latents)[0].float().mean(-1)  # (8, 8)
    decoded = pipeline.decode(latents)[0].float().mean(-1)  # (64, 64)
    pooled = adaptive_avg_pool2d(decoded[None], 8)[0]
    assert np.corrcoef(preview.flatten(), pooled.flatten())[0, 1] > 0.8


def test_the_command_fits_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.cpu_rows.prepare_process", lambda: None)  # it would change this process
    monkeypatch.setattr(LaMambaPipeline, "load", lambda *_, **__: fake_pipeline())
    done = CliRunner().invoke(app, ["fit-previews", str(tmp_path), "--num", "7"])
    assert done.exit_code == 0, done.output
    assert "of the variance of 7 images" in done.output
    assert read_preview_map(tmp_path, latent_channels=CHANNELS) is not None
    refused = CliRunner().invoke(app, ["fit-previews", str(tmp_path), "--num", "0"])
    assert (refused.exit_code, "num: 0 given" in refused.output) == (2, True)
    missing = CliRunner().invoke(app, ["fit-previews", str(tmp_path / "none")])
    assert (missing.exit_code, "no such model folder" in missing.output) == (2, True)
