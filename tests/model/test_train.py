"""If this fails, training stops learning, a resumed run is another run, or its result cannot be served."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from model.autoencoder import Autoencoder
from model.data.latents import LatentCache
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend
from model.pipeline import LaMambaPipeline
from model.train import TrainConfig, Trainer, train

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

    def poisoned(self: Trainer, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps.append({name: value.clone() for name, value in self.network.state_dict().items()})
        loss, mse, vb = original(self, *args)
        return (loss * torch.nan if len(steps) == 2 else loss), mse, vb

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
    torch.manual_seed(0)
    architecture = config.network_config(num_classes=21, downsampling=2, in_channels=4)
    network = LaMambaDiff(**dataclasses.asdict(architecture))
    network.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides `self` from the checker
    network.use_scan_backend(resolve_scan_backend("auto", device))
    return Trainer(config, data, network.train())


def _steps(trainer: Trainer, count: int) -> torch.Tensor:
    return torch.stack([torch.stack(list(trainer.train_step().values())) for _ in range(count)]).cpu()


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
    second.load_state_dict(copy.deepcopy(first.state_dict()))
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
    assert captured._captured_step is not None
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
    second.load_state_dict(copy.deepcopy(first.state_dict()))
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 given; at least 1 is accepted"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 given; more than 0 is accepted"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 given; 0 to below 1 is accepted"),
        ({"learning_rate_schedule": "step"}, "constant or cosine is accepted"),
        ({"compile": False}, "compile: False given; one of none, block, full is accepted"),
        ({"epochs": 3}, "epochs: unknown field"),
    ],
    ids=["batch", "rate", "ema", "schedule", "compile", "unknown"],
)
def test_train_config_refuses(
    make_config: Callable[..., TrainConfig], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("refused", **fields)


def test_train_config_names_a_missing_field() -> None:
    with pytest.raises(ValueError, match="output_dir: missing"):
        TrainConfig.from_dict({"name": "x", "autoencoder": "a", "resolution": 128})
