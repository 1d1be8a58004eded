"""If this fails, training stops learning, a resumed run is another run, or its result cannot be served."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from model.autoencoder import Autoencoder
from model.averaged_adamw import AveragedAdamW
from model.data.latents import LatentCache
from model.pipeline import LaMambaPipeline
from model.training.config import TrainConfig
from model.training.export import export_run
from model.training.network import build_network
from model.training.objective import Losses
from model.training.run import Diverged, train
from model.training.source import CachedSource
from model.training.states import FACTS_FILE, SavedState, read_state
from model.training.trainer import Trainer
from model.training.world import World
from tests.latents_cache import save_latents

# Few parameters: each is a record of every state.
TINY = {"layout": "isotropic", "hidden_size": 8, "num_heads": 2, "depths": [2], "bottleneck_depth": 0}
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
            "network": TINY,
            "num_views": 24,
            "num_images": 40,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "log_every": 1,
            "tensorboard": False,
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
    # A deadline in the past stops after each step: two runs of one step and one of three make five.
    for _ in range(2):
        assert train(dataclasses.replace(broken, stop_after_s=1e-9), device="cpu") is None
    assert train(broken, device="cpu") is not None
    assert _weights(broken) == _weights(straight)


def test_the_deadline_and_states_do_not_wait_for_a_log_line(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(
        "slow", log_every=1000, keep_states=9, snapshot_every=8, ema_tracks=[0.1], ema_track_interval=1
    )
    run = Path(config.output_dir)
    assert train(dataclasses.replace(config, stop_after_s=1e-9), device="cpu") is None
    assert [path.name for path in (run / "states").glob("state-*")] == ["state-000000000008"]
    assert [path.name for path in (run / "snapshots").iterdir()] == ["averages-000000000008.safetensors"]
    assert train(dataclasses.replace(config, state_every_s=1e-9), device="cpu") is not None
    assert len(list((run / "states").glob("state-*"))) == 5


def test_a_resumed_run_takes_back_snapshots_that_come_again(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(
        "back", num_images=24, snapshot_every=8, ema_tracks=[0.1], ema_track_interval=1, state_every_s=1e-9
    )
    train(config, device="cpu")
    run = Path(config.output_dir)
    shutil.rmtree(run / "states" / "state-000000000024")
    assert train(dataclasses.replace(config, snapshot_every=0, stop_after_s=1e-9), device="cpu") is not None
    images = [path.stem.removeprefix("averages-").lstrip("0") for path in (run / "snapshots").iterdir()]
    assert sorted(images) == ["16", "8"]


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


@pytest.mark.parametrize("heals", [True, False], ids=["heals", "stays"])
def test_a_run_without_finite_gradients_goes_back_and_then_gives_up(
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    heals: bool,
) -> None:
    """From image 16 on; where it heals, until the weights are older ones."""
    original = Trainer._mean_losses
    before: dict[int, dict[str, torch.Tensor]] = {}

    def poisoned(self: Trainer, *args: torch.Tensor) -> Losses:
        images = self.images_seen
        before[images] = {name: tensor.clone() for name, tensor in self.tensors().items() if "/" in name}
        losses = original(self, *args)
        sick = images >= 16 and not (heals and images >= 32)
        return losses._replace(loss=losses.loss * torch.nan) if sick else losses

    monkeypatch.setattr(Trainer, "_mean_losses", poisoned)
    config = make_config("sick", num_images=48, rollback_after_steps=2, max_rollbacks=1, state_every_s=1e-9)
    with caplog.at_level(logging.WARNING):
        if heals:
            assert train(config, device="cpu") is not None
        else:
            with pytest.raises(Diverged, match=r"up to image 48, and 1 rollbacks did not help. Try a lower"):
                train(config, device="cpu")
    assert (
        "2 steps in a row without finite gradients, up to image 32: going on with new samples" in caplog.text
    )
    assert all(torch.equal(before[32][name], before[16][name]) for name in before[16])
    log = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert log[2]["loss"] is None
    if heals:
        assert log[-1]["loss"] is not None
        assert log[-1]["images"] == 48


def test_a_resumed_run_has_the_rollbacks_of_before(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._mean_losses

    def poisoned(self: Trainer, *args: torch.Tensor) -> Losses:
        losses = original(self, *args)
        sick = 16 <= self.images_seen < 32 or self.images_seen >= 48
        return losses._replace(loss=losses.loss * torch.nan) if sick else losses

    monkeypatch.setattr(Trainer, "_mean_losses", poisoned)
    fields = {"rollback_after_steps": 2, "max_rollbacks": 1, "state_every_s": 1e-9}
    assert train(make_config("sick", num_images=40, **fields), device="cpu") is not None
    with pytest.raises(Diverged, match=r"up to image 64, and 1 rollbacks did not help"):
        train(make_config("sick", num_images=72, **fields), device="cpu")


def test_a_run_that_is_sick_from_the_first_step_gives_up(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: Trainer, *args: torch.Tensor) -> Losses:
        losses = original(self, *args)
        return losses._replace(loss=losses.loss * torch.inf)

    original = Trainer._mean_losses
    monkeypatch.setattr(Trainer, "_mean_losses", poisoned)
    with pytest.raises(Diverged, match=r"3 steps in a row .* and there is no saved state yet"):
        train(make_config("sick", rollback_after_steps=3), device="cpu")


def test_labels_are_dropped_in_one_place(make_config: Callable[..., TrainConfig]) -> None:
    """All of them, where the probability is 1: the network is then that without labels."""
    config = make_config("dropped", network=TINY | {"class_dropout_prob": 1.0})
    trainer = _trainer(config, "cpu")
    seen: list[torch.Tensor] = []
    trainer.network.module.label_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _steps(trainer, 1)
    (labels,) = seen
    assert labels.tolist() == [21] * 8


def test_samples_are_drawn_when_their_number_is_passed(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config("drawn", num_images=32, sample_every=20)
    train(config, device="cpu")
    pictures = sorted(path.name for path in (Path(config.output_dir) / "samples").iterdir())
    assert pictures == ["samples-000000000024.png"]


def test_export_writes_any_kept_state_and_any_length(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        "kept",
        ema_tracks=[0.05, 0.1],
        ema_track_interval=1,
        snapshot_every=16,
        keep_states=1,
        keep_state_every=16,
        state_every_s=1e-9,
    )
    train(config, device="cpu")
    run = Path(config.output_dir)

    def exported(**options: Any) -> bytes:
        export_run(run, tmp_path / "model", **options)
        path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
        return path.read_bytes()

    assert exported() == _weights(config)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| images seen | 40 |" in card
    assert "tags: [class-conditional]" in card
    assert "A class-conditional latent diffusion model" in card
    assert "views of `places`, 21 classes, digest" in card
    different = [
        exported(images_seen=16),
        exported(weights="network"),
        exported(sigma_rel=0.1),
        exported(sigma_rel=0.07),
        exported(sigma_rel=0.07, images_seen=32),
    ]
    assert len({*different, exported()}) == 6
    assert LaMambaPipeline.load(tmp_path / "model", device="cpu").has_previews
    with pytest.raises(ValueError, match=r"images: 24 given; the run has states of 40, 32, 16 images"):
        exported(images_seen=24)
    looked_at: list[Path] = []

    def looking(folder: Path) -> SavedState | None:
        looked_at.append(folder)
        return read_state(folder)

    with monkeypatch.context() as context:
        context.setattr("model.training.export.read_state", looking)
        exported(images_seen=16)
        assert [folder.name for folder in looked_at] == ["state-000000000016"]
        (run / "states" / "state-000000000032" / FACTS_FILE).write_text("[]")
        with pytest.raises(ValueError, match=r"images: 32 given; .*state-000000000032 is damaged"):
            exported(images_seen=32)
    with pytest.raises(ValueError, match=r"weights: 'best' given; ema or network is accepted"):
        exported(weights="best")
    with pytest.raises(ValueError, match=r"run: .* given; a run's folder with saved states is accepted"):
        export_run(tmp_path, tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    for target, message in (
        (other, r"target: .*other holds README\.md and no model; a new folder"),
        (other / "README.md", r"target: .*README\.md given, which is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            export_run(run, target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": "ddp"}, "parallel: 'ddp' given without torchrun"),
        ({"micro_batch_size": 3}, "micro_batch_size: 3 given; a divisor of 8"),
        ({"data": "absent", "autoencoder": "not/downloaded"}, "latents: absent has no index.json"),
        ({"snapshot_every": 64}, "snapshot_every: 64 given without ema_tracks, of which snapshots are"),
        (
            {"ema_tracks": [0.1], "num_images": 63},
            "num_images: 63 given; with ema_tracks at least 64, the im",
        ),
        (
            {"ema_tracks": [0.1], "num_images": 640, "snapshot_every": 8},
            "snapshot_every: 8 given; with ema_tracks at least 64, the images of their first update",
        ),
        ({"wandb": "project"}, r"wandb: not installed; pip install 'lamamba\[wandb\]'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_train_refuses_at_once(
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config = make_config("refused", **fields)
    with pytest.raises(ValueError, match=message):
        train(config, device="cpu")
    assert not Path(config.output_dir).exists()


def test_train_refuses_what_does_not_divide_or_fit(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size: 8 given; a multiple of the 3 processes is accepted"):
        train(make_config("refused"), device="cpu")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"output_dir: .* has 0.0 GiB free; 0.0 GiB are needed for 2 states"):
        train(make_config("refused"), device="cpu")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    many = make_config(
        "refused", ema_tracks=[0.1], ema_track_interval=1, snapshot_every=8, num_images=8_000_000
    )
    with pytest.raises(
        ValueError, match=r"one more while it is written, and for 1000000 snapshots of 0.0 GiB"
    ):
        train(many, device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr("os.sysconf", lambda _: 1)
    with pytest.raises(ValueError, match=r"network: 0 M parameters given; weights, .* cpu has 0.0: parallel"):
        train(make_config("refused"), device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"scan_backend": "fast"}, "scan_backend: 'fast'"), ({"initial_weights": "absent"}, "absent")],
    ids=["scan", "weights"],
)
def test_a_network_that_cannot_be_built_is_refused_before_views_are_encoded(
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    message: str,
) -> None:
    encoded: list[object] = []
    monkeypatch.setattr("model.training.data.TrainingData.source", lambda *data: encoded.append(data))
    with pytest.raises((ValueError, OSError), match=message):
        train(make_config("refused", **fields), device="cpu")
    assert not encoded


def test_a_rank_that_fails_alone_says_why(
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Commands print the lines of the main rank, which knows nothing of it."""

    def fail(trainer: Trainer) -> None:
        raise ValueError("latents: a shard cannot be read")

    monkeypatch.setattr(Trainer, "train_step", fail)
    monkeypatch.setattr(World, "is_main", False)
    with pytest.raises(ValueError, match="a shard cannot be read"):
        train(make_config("failed"), device="cpu")
    assert "rank 0 of 1: latents: a shard cannot be read" in caplog.text


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "prepare", lambda _: signal.raise_signal(signal.SIGTERM))
    config = make_config("early")
    with pytest.raises(SystemExit) as caught:
        train(config, device="cpu")
    assert caught.value.code == 143
    assert not (Path(config.output_dir) / "states").exists()


def _trainer(config: TrainConfig, device: str, world: World | None = None) -> Trainer:
    """A trainer on random moments of the right shapes, always the same."""
    generator = torch.Generator().manual_seed(1)
    data = LatentCache(
        torch.randn(24, 8, 8, 8, generator=generator).half().to(device),
        torch.randint(21, (24,), generator=generator).to(device),
        Autoencoder.load(config.autoencoder, device),
    )
    architecture = config.network_config(num_classes=21, downsampling=2, in_channels=4)
    world = world or World(device=torch.device(device))
    source = CachedSource(data, rows=config.batch_size, seed=config.seed)
    return Trainer(config, source, build_network(config, architecture, world.device), world)


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


@pytest.mark.parametrize("parallel", ["none", "ddp"])
def test_a_step_that_failed_is_not_counted_when_it_is_taken_again(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    """As one that was out of memory, midway through its micro-batches."""
    monkeypatch.setattr("model.training.gradients._BUCKET_NUMBERS", 5000)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    config = make_config("again", micro_batch_size=2)
    world = World(device=torch.device("cpu"), parallel=parallel)
    expected = _steps(_trainer(config, "cpu", world), 3)
    trainer = _trainer(config, "cpu", world)
    losses = Trainer._losses

    def out_of_memory(self: Trainer, part: slice) -> Losses:
        if self.step == 1 and part.start == 4:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, part)

    _steps(trainer, 1)
    with monkeypatch.context() as context:
        context.setattr(Trainer, "_losses", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            _steps(trainer, 1)
    assert torch.equal(_steps(trainer, 2), expected[1:])


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


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's, and FSDP's of the network's output
def test_a_rank_alone_takes_the_steps_of_a_process(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, device: str, parallel: str
) -> None:
    """On CUDA ddp is two graphs with NCCL between them, and fsdp one with NCCL in it, and blocks that are
    compiled inside its hooks.
    """
    monkeypatch.setattr("model.training.gradients._BUCKET_NUMBERS", 5000)  # several messages and groups
    config = make_config("alone", max_grad_norm=1.0, micro_batch_size=4, activation_checkpointing=True)
    single = _trainer(dataclasses.replace(config, cuda_graph=False), device)
    start = [parameter.detach().clone() for parameter in single.optimizer.parameters]
    expected = _steps(single, 5)
    with World.joined(parallel, device=device) as world:
        trainer = _trainer(config, device, world)
        losses = _steps(trainer, 5)
        tolerance = CAPTURE_TOLERANCE["losses"] if device == "cuda" else 1e-5
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=1e-6)
        _assert_same_run(single.optimizer.parameters, trainer.optimizer.parameters, start)
        _assert_same_run(single.optimizer.average, trainer.optimizer.average, start)
        assert trainer._captures == (device == "cuda")
        trainer.capture(False)


@pytest.mark.usefixtures("torchrun")
def test_graphs_are_freed_before_their_world_ends(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of NCCL's group waits for those that hold its messages, also where a run fails."""
    order: list[str] = []
    prepare, end = Trainer.prepare, dist.destroy_process_group

    def prepared(trainer: Trainer) -> None:
        prepare(trainer)
        trainer._graphs.append(SimpleNamespace(close=lambda: order.append("freed")))  # type: ignore[arg-type]

    def ended() -> None:
        order.append("ended")
        end()

    def fails(trainer: Trainer) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Trainer, "prepare", prepared)
    monkeypatch.setattr(dist, "destroy_process_group", ended)
    train(make_config("whole", parallel="ddp", num_images=8), device="cpu")
    monkeypatch.setattr(Trainer, "train_step", fails)
    with pytest.raises(RuntimeError, match="a fault"):
        train(make_config("failed", parallel="ddp"), device="cpu")
    assert order == 2 * ["freed", "ended"]


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


def test_a_step_without_memory_says_what_to_try(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(trainer: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(ValueError, match=r"^micro_batch_size: 4 given; cpu has no memory .*=true \(CUDA out"):
        train(make_config("large", micro_batch_size=4), device="cpu")
    with pytest.raises(ValueError, match=r"^micro_batch_size: 8 given; .* fewer may fit \(CUDA out"):
        train(make_config("larger", activation_checkpointing=True), device="cpu")


def test_train_refuses_to_mix_two_runs(make_config: Callable[..., TrainConfig]) -> None:
    train(make_config("mixed", num_images=8), device="cpu")
    with pytest.raises(ValueError, match=r"batch_size: 4 given; the run in .* was started with 8"):
        train(make_config("mixed", batch_size=4), device="cpu")


def test_a_run_is_known_by_its_network_and_data_not_by_their_spelling(
    make_config: Callable[..., TrainConfig], autoencoder: Path, tmp_path: Path
) -> None:
    latents = tmp_path / "latents"
    save_latents(latents, (8,), side=8, autoencoder=Autoencoder.load(autoencoder).weights_hash)
    fields = {"data": str(latents), "num_images": 8}
    train(make_config("known", **fields), device="cpu")
    shutil.move(latents, tmp_path / "moved")
    fields = {"data": str(tmp_path / "moved"), "num_images": 16}
    for changed, message in (
        ({"hidden_size": 12}, r"network\.hidden_size: 12 given; the run in .* was started with 8, continue"),
        ({"num_classes": 0}, r"network\.num_classes: 0 given; the run in .* was started with 3, continue"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_config("known", **fields, network=TINY | changed), device="cpu")
    spelled = TINY | {"kind": "lamamba", "num_classes": 3, "patch_size": 1}
    assert train(make_config("known", **fields, network=spelled), device="cpu") is not None


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
        with pytest.raises(ValueError, match="micro_batch_size: 16 given; cpu has no memory for that"):
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
