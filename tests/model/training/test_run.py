"""If this fails, training stops learning, a resumed run is another run, or its result cannot be served."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from model.autoencoder import Autoencoder
from model.averaged_adamw import AveragedAdamW
from model.data.latents import LatentCache
from model.pipeline import LaMambaPipeline
from model.training.config import TrainConfig
from model.training.network import build_network
from model.training.objective import Losses
from model.training.run import train
from model.training.source import CachedSource
from model.training.trainer import Trainer
from model.training.world import World

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Relative, of losses and of the weights' change over five steps: bf16 roundings that fall differently. Other
# random numbers or learning rates differ by tens of percent.
CAPTURE_TOLERANCE = {"losses": 5e-3, "weights": 5e-2}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(autoencoder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(run: str, **fields: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "name": "tiny",
            "output_dir": str(tmp_path / run),
            "autoencoder": str(autoencoder),
            "resolution": 16,
            "network": {"hidden_size": 8, "num_heads": 2},
            "num_views": 24,
            "num_images": 40,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "log_every": 1,
        }
        return TrainConfig.from_dict(defaults | fields)

    return make


def _weights(config: TrainConfig) -> bytes:
    path = Path(config.output_dir) / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    return path.read_bytes()


def test_train_makes_a_folder_that_generates(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config("whole")
    folder = train(config, device="cpu")
    assert folder is not None
    pipeline = LaMambaPipeline.load(folder, device="cpu")
    assert pipeline.num_classes == len(pipeline.labels) == 21
    assert pipeline.generate([4], seeds=[0], num_inference_steps=2).shape == (1, 16, 16, 3)
    log = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert [record["images"] for record in log] == [8, 16, 24, 32, 40]
    assert all(math.isfinite(record["loss"]) and record["skipped_steps"] == 0 for record in log)
    saved = json.loads((Path(config.output_dir) / "config.json").read_text())
    assert saved["batch_size"] == 8


def test_a_resumed_run_is_bitwise_the_straight_run(make_config: Callable[..., TrainConfig]) -> None:
    straight, broken = make_config("straight"), make_config("broken")
    train(straight, device="cpu")
    # A deadline in the past stops after each step: five runs of one step make the run of five.
    for _ in range(4):
        assert train(dataclasses.replace(broken, stop_after_s=1e-9), device="cpu") is None
    assert train(broken, device="cpu") is not None
    assert _weights(broken) == _weights(straight)


def test_train_learns(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config("learns", num_images=480, learning_rate=3e-3, log_every=10)
    train(config, device="cpu")
    log = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert log[-1]["mse"] < 0.8 * log[0]["mse"]


def test_a_step_with_non_finite_gradients_changes_nothing(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    original = Trainer._mean_losses

    def poisoned(self: Trainer, *args: torch.Tensor) -> Losses:
        steps.append({name: value.clone() for name, value in self.tensors().items() if "/" in name})
        losses = original(self, *args)
        return losses._replace(loss=losses.loss * torch.nan) if len(steps) == 2 else losses

    monkeypatch.setattr(Trainer, "_mean_losses", poisoned)
    config = make_config("poisoned", num_images=32)
    train(config, device="cpu")
    changed = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(steps)
    ]
    assert changed == [True, False, True]
    last = json.loads((Path(config.output_dir) / "log.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps"] == 1


def _trainer(config: TrainConfig, device: str) -> Trainer:
    """A trainer on random moments of the right shapes, always the same."""
    generator = torch.Generator().manual_seed(1)
    data = LatentCache(
        torch.randn(24, 8, 8, 8, generator=generator).half().to(device),
        torch.randint(21, (24,), generator=generator).to(device),
        Autoencoder.load(config.autoencoder, device),
    )
    architecture = config.network_config(num_classes=21, downsampling=2, in_channels=4)
    where = torch.device(device)
    source = CachedSource(data, rows=config.batch_size, seed=config.seed)
    return Trainer(config, source, build_network(config, architecture, where), World(device=where))


def _steps(trainer: Trainer, count: int) -> torch.Tensor:
    return torch.stack([torch.stack(trainer.train_step()) for _ in range(count)]).cpu()


def _copy_state(source: Trainer, target: Trainer) -> None:
    saved = source.tensors()
    with torch.no_grad():
        for name, tensor in target.tensors().items():
            tensor.copy_(saved[name])
    target.go_on_from(source.images_seen)


def _assert_same_run(
    expected: list[torch.Tensor], given: list[torch.Tensor], start: list[torch.Tensor]
) -> None:
    change, difference = (
        math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in zip(ours, theirs, strict=True)))
        for ours, theirs in ((expected, start), (expected, given))
    )
    assert difference < CAPTURE_TOLERANCE["weights"] * change


def test_trainer_goes_on_from_a_state_dict(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config("state", learning_rate_schedule="cosine", warmup_images=16)
    straight = _trainer(config, "cpu")
    losses = _steps(straight, 5)
    first, second = _trainer(config, "cpu"), _trainer(config, "cpu")
    _steps(first, 2)
    _copy_state(first, second)
    assert torch.equal(_steps(second, 3), losses[2:])
    for a, b in zip(straight.optimizer.state(), second.optimizer.state(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's, of what it looks at itself
@pytest.mark.parametrize("compile_mode", ["none", "block", "full"])
def test_captured_steps_are_the_steps(make_config: Callable[..., TrainConfig], compile_mode: str) -> None:
    config = make_config(
        "captured", compile=compile_mode, learning_rate_schedule="cosine", warmup_images=16, max_grad_norm=1.0
    )
    called = _trainer(dataclasses.replace(config, cuda_graph=False), "cuda")
    captured = _trainer(config, "cuda")
    start = [parameter.detach().clone() for parameter in called.optimizer.parameters]
    expected = _steps(called, 5)
    torch.testing.assert_close(_steps(captured, 5), expected, rtol=CAPTURE_TOLERANCE["losses"], atol=1e-6)
    assert captured._captures
    assert captured.optimizer.skipped_steps == 0
    _assert_same_run(called.optimizer.parameters, captured.optimizer.parameters, start)
    _assert_same_run(called.optimizer.average, captured.optimizer.average, start)


@pytest.mark.gpu
@needs_cuda
def test_captured_run_resumes(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config("resumed", compile="none", learning_rate_schedule="cosine", warmup_images=16)
    straight = _trainer(config, "cuda")
    start = [parameter.detach().clone() for parameter in straight.optimizer.parameters]
    losses = _steps(straight, 5)
    first, second = _trainer(config, "cuda"), _trainer(config, "cuda")
    _steps(first, 2)
    _steps(second, 1)  # so that it must capture anew
    _copy_state(first, second)
    resumed = _steps(second, 3)
    torch.testing.assert_close(resumed, losses[2:], rtol=CAPTURE_TOLERANCE["losses"], atol=1e-6)
    _assert_same_run(straight.optimizer.parameters, second.optimizer.parameters, start)
    _assert_same_run(straight.optimizer.average, second.optimizer.average, start)


def test_initial_weights_must_fit_the_network(make_config: Callable[..., TrainConfig]) -> None:
    folder = train(make_config("first", num_images=8), device="cpu")
    again = make_config("second", num_images=8, initial_weights=str(folder))
    assert train(again, device="cpu") is not None
    other = make_config("third", initial_weights=str(folder), network={"hidden_size": 12, "num_heads": 2})
    with pytest.raises(ValueError, match=r"initial_weights: .* is accepted"):
        train(other, device="cpu")


def test_train_refuses_to_mix_two_runs(make_config: Callable[..., TrainConfig]) -> None:
    train(make_config("mixed", num_images=8), device="cpu")
    with pytest.raises(ValueError, match=r"batch_size: 4 given; the run in .* was started with 8"):
        train(make_config("mixed", batch_size=4), device="cpu")


def test_train_takes_other_optimizer_settings_on_resume(
    make_config: Callable[..., TrainConfig], caplog: pytest.LogCaptureFixture
) -> None:
    weights = {}
    for decay in (0.0, 5.0):
        train(make_config(f"decay {decay}", num_images=8), device="cpu")
        with caplog.at_level(logging.INFO):
            train(make_config(f"decay {decay}", num_images=16, weight_decay=decay), device="cpu")
        weights[decay] = _weights(make_config(f"decay {decay}"))
    assert weights[0.0] != weights[5.0]
    assert caplog.text.count("weight_decay: 5.0 from here on, 0.0 before") == 1


def test_train_refuses_another_autoencoder(
    make_config: Callable[..., TrainConfig], autoencoder: Path, tmp_path: Path
) -> None:
    train(make_config("vae", num_images=8), device="cpu")
    same, other, scaled = tmp_path / "same", tmp_path / "other", tmp_path / "scaled"
    module = AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False)
    module.save_pretrained(same)
    module.register_to_config(scaling_factor=0.5)
    module.save_pretrained(scaled)
    with torch.no_grad():
        module.encoder.conv_in.weight.mul_(1.5)
    module.register_to_config(scaling_factor=0.18215)
    module.save_pretrained(other)
    for folder in (other, scaled):
        with pytest.raises(ValueError, match=r"autoencoder: .* given; the run in .* learns the latents of"):
            train(make_config("vae", autoencoder=str(folder)), device="cpu")
    assert train(make_config("vae", num_images=16, autoencoder=str(same)), device="cpu") is not None


def test_a_run_that_never_started_fixes_nothing(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("failed", resolution=48, autoencoder="absent", num_images=8)
    with pytest.raises(ValueError, match="autoencoder: absent given"):
        train(config, device="cpu")
    assert not Path(config.output_dir).exists()

    def out_of_memory(_: Trainer) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as context:
        context.setattr(Trainer, "train_step", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train(make_config("failed", batch_size=16), device="cpu")
    assert train(make_config("failed", num_images=8), device="cpu") is not None


def test_a_fault_is_not_hidden_by_saving(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a device fault its memory cannot be read: saving would raise another error."""

    def fault(_: Trainer) -> None:
        monkeypatch.setattr(Trainer, "tensors", fault)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Trainer, "train_step", fault)
    config = make_config("fault")
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        train(config, device="cpu")
    assert caught.value.__context__ is None
    assert not (Path(config.output_dir) / "states").exists()


@pytest.mark.parametrize("log_every", [1, 1000], ids=["at-a-log-line", "between-log-lines"])
def test_an_interrupt_saves_the_whole_step(
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    log_every: int,
) -> None:
    straight, broken = make_config("straight"), make_config("broken", log_every=log_every)
    train(straight, device="cpu")
    original = AveragedAdamW.step

    def interrupted(self: AveragedAdamW) -> torch.Tensor:
        norm = original(self)
        signal.raise_signal(signal.SIGINT)  # the weights have moved, their images are not counted
        return norm

    with monkeypatch.context() as context, caplog.at_level(logging.INFO):
        context.setattr(AveragedAdamW, "step", interrupted)
        with pytest.raises(SystemExit) as caught:
            train(broken, device="cpu")
    assert caught.value.code == 130
    assert "SIGINT: stopped after 8 images; the same command goes on" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(broken, device="cpu") is not None
    assert _weights(broken) == _weights(straight)
