"""If these fail, a training run on a GPU is lost: it does not learn, resume or write its outputs."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model.autoencoder import Autoencoder
from model.autoencoder_training import loss as autoencoder_loss
from model.autoencoder_training import run as autoencoder_run
from model.autoencoder_training.config import AutoencoderTrainingConfig
from model.autoencoder_training.loss import AutoencoderLoss
from model.autoencoder_training.perceptual_loss import PerceptualLoss
from model.autoencoder_training.run import train
from model.autoencoder_training.states import load_newest_state
from model.cli import app
from model.data.places import Places
from model.lock_file import locked

TINY = AutoencoderTrainingConfig(
    block_out_channels=(4, 4, 8, 8),
    norm_num_groups=4,
    sizes=(16, 32),
    crop=16,
    batch_size=4,
    max_images=32,
    warmup_steps=2,
    compile=False,
    log_steps=1,
    checkpoint_seconds=0.0,
    evaluation_views=4,
    statistics_views=8,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run's folder and metrics, to be read alone."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(TINY, folder, "cpu")


def test_train_writes_every_output(straight: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = straight
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert json.loads((folder / "config.json").read_text())["sizes"] == [16, 32]
    assert (folder / "reconstructions.png").stat().st_size > 0
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"images_per_s", *AutoencoderLoss.TERMS, *PerceptualLoss.TERMS} <= rows[0].keys()
    assert metrics["images"] == 32
    assert set(metrics["reconstruction"]) == {"16", "32"}
    assert {size: len(response) for size, response in metrics["point_response"].items()} == {"16": 4, "32": 4}
    assert metrics["latents"]["std"] == pytest.approx([1] * 4, rel=1e-2)  # fp16 weights
    autoencoder = Autoencoder.load(folder / "vae")
    assert autoencoder.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)


def test_train_lowers_the_loss(tmp_path: Path) -> None:
    larger = replace(TINY, block_out_channels=(16, 16, 32, 32), sizes=(32, 64), crop=32, batch_size=8)
    config = replace(larger, max_images=480, learning_rate=3e-3, perceptual_weight=0.0)
    config = replace(config, checkpoint_seconds=1e9)
    train(config, tmp_path, "cpu")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (sum(row["l1"] for row in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.9 * first


def test_train_stopped_and_resumed_equals_straight(
    straight: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = straight
    log = autoencoder_run._log

    def stop_after_three(path: Path, run: Any, *rest: Any) -> None:
        log(path, run, *rest)
        if run.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(autoencoder_run, "_log", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "resumed", "cpu")
    resumed = train(TINY, tmp_path / "resumed", "cpu")

    timing = ("seconds", "images_per_s")
    assert {k: v for k, v in resumed.items() if k not in timing} == {
        k: v for k, v in metrics.items() if k not in timing
    }
    states = [load_newest_state(run / "states") for run in (folder, tmp_path / "resumed")]
    averages = [state["average"] for state in states if state is not None]
    assert len(averages) == 2
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))
    assert not [path for run in (folder, tmp_path) for path in run.rglob("*.tmp")]


def test_a_signal_ends_the_run_after_the_step_with_a_saved_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = autoencoder_run._log

    def interrupted(path: Path, run: Any, *rest: Any) -> None:
        log(path, run, *rest)
        if run.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(autoencoder_run, "_log", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(replace(TINY, checkpoint_seconds=60.0), tmp_path, "cpu")
    assert caught.value.code == 143
    state = load_newest_state(tmp_path / "states")
    assert state is not None
    assert state["step"] == 3


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"), pytest.raises(ValueError, match="belongs to a run that is not over"):
        train(TINY, tmp_path, "cpu")


def test_train_goes_on_from_the_weights_of_an_earlier_run(
    straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, earlier = straight
    config = replace(TINY, initial_weights=str(folder / "vae"), max_images=2, learning_rate=1e-9)
    later = train(replace(config, sizes=(16,), batch_size=2), tmp_path / "later", "cpu")
    assert later["steps"] == 1
    psnr = [metrics["reconstruction"]["16"]["psnr"] for metrics in (earlier, later)]
    assert psnr[1] == pytest.approx(psnr[0], abs=0.05)


def test_train_of_the_decoder_alone_keeps_the_latents(
    straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = straight
    config = replace(TINY, initial_weights=str(folder / "vae"), train_encoder=False)
    train(config, tmp_path, "cpu")
    earlier, later = (Autoencoder.load(run / "vae") for run in (folder, tmp_path))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = earlier.encode_moments(images)
    assert torch.equal(moments, later.encode_moments(images))
    assert not torch.equal(earlier.decode(moments[:, :4]), later.decode(moments[:, :4]))


def test_train_ends_by_time(tmp_path: Path) -> None:
    metrics = train(replace(TINY, max_images=None, max_seconds=0.2), tmp_path, "cpu")
    assert metrics["seconds"] >= 0.2
    assert metrics["steps"] >= 1


def test_train_refuses_another_config_in_the_same_folder(straight: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = straight
    with pytest.raises(ValueError, match=r"kl_weight: 1.0 given; .* accepts 0.05, with which it began"):
        train(replace(TINY, kl_weight=1.0), folder, "cpu")


def _flat(run: autoencoder_run._Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.parameters])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_are_the_steps(tmp_path: Path) -> None:
    """The same views, noise, learning rates and weights, up to bf16 roundings."""
    places = Places.load(device="cuda")
    terms, weights = [], []
    for captured in (False, True):
        config = replace(TINY, cuda_graph=captured)
        run = autoencoder_run._Run(config, tmp_path / str(captured), torch.device("cuda"))
        start = _flat(run)
        step = autoencoder_run._ready_step(run, places)
        assert torch.equal(_flat(run), start)
        rows = []
        for run.step in range(6):
            run.prepare_step()
            rows.append(step().clone())
            run.images += config.batch_size
        terms.append(torch.stack(rows))
        weights.append(_flat(run) - start)
    torch.testing.assert_close(terms[1], terms[0], rtol=2e-2, atol=1e-4)
    assert (weights[1] - weights[0]).norm() < 0.1 * weights[0].norm()


def test_train_stops_when_no_gradient_is_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder_loss, "_gradient_error", lambda error: error.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="gradients: none finite"):
        train(TINY, tmp_path, "cpu")


def test_the_command_ends_with_code_2_and_a_line_on_a_bad_setting(tmp_path: Path) -> None:
    arguments = ["train-autoencoder", "--output-dir", str(tmp_path), "--set", "kl_weight=-1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "kl_weight: -1" in result.output
    assert not list(tmp_path.iterdir())
