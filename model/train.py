"""Training LaMamba-Diff on latents: noise, network, loss, AdamW, EMA (paper section 4.1, DiT's recipe).

Progress is counted in images. The random numbers of a step are a function of (seed, images seen) alone, so a
resumed run continues exactly without stored generator states. Parameters, EMA and scan state are fp32; the
network runs under bf16 autocast on CUDA. A step whose gradients are not finite changes nothing and is
counted.

On CUDA a whole step, from drawing latents to the EMA, is one CUDA graph, and the blocks are compiled. The
compiler keeps its results in TORCHINDUCTOR_CACHE_DIR: with a folder that lasts, or one copied from another
machine of the same kind, the next run starts several times faster.

A run's folder (`output_dir`) holds `config.json` (the resolved configuration), `states/` (resumable),
`log.jsonl`, and at the end `model/`: the EMA weights as the folder that the service loads. The same command
resumes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from model.autoencoder import Autoencoder
from model.averaged_adamw import AveragedAdamW
from model.checkpoint import load_newest_state, save_state
from model.config import LaMambaConfig
from model.cuda_graph import CapturedStep
from model.data.latents import LatentCache, places_latents
from model.data.places import Places
from model.diffusion.loss import LossTables, diffusion_loss, q_sample
from model.diffusion.schedule import NoiseSchedule
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend
from model.pipeline import load_network, save_model_folder

logger = logging.getLogger(__name__)

# Pixels encoded at a time: 256 images of 256 px, about 6 GB of activations in bf16.
_ENCODING_PIXELS = 2**24
_FIXED_FIELDS = ("network", "resolution", "num_views", "batch_size", "seed")
_COMPILE_MODES = ("none", "block", "full")
_MAX_DISTINCT_BLOCKS = 64  # torch stops a program that compiles one function more often than 8 times
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that seeds and image counts never meet in one generator seed


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. ValueError names a bad field, its value and what is accepted."""

    name: str
    """The model's name, by which the service will list it."""
    output_dir: str
    """The run's folder; a run found there is resumed."""
    autoencoder: str
    """Folder or hub id of the AutoencoderKL whose latents are learned."""
    resolution: int
    """Side of the training images in pixels."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of LaMambaConfig; `preset: S|B|L|XL` may stand among them. `num_classes` follows from the data.
    """
    num_views: int = 200_000
    """Views of `places` in the latents cache."""
    num_images: int = 1_000_000
    """Images to train on in all."""
    batch_size: int = 256
    """Images in one optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant as in the paper, or a cosine to zero at `num_images`."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = math.inf
    """Gradients are scaled down to this norm; inf leaves them."""
    ema_decay: float = 0.9999
    """Decay of the weights' moving average a step, reached from below as (1 + step) / (10 + step)."""
    seed: int = 0
    initial_weights: str | None = None
    """A model folder whose transformer the run starts from, with fresh optimizer moments."""
    compile: Literal["none", "block", "full"] = "block"
    """On CUDA, torch.compile of each block, where like ones share the result (places-256: 6 for 13), or of
    the loss as a whole, which takes two to three times as long.
    """
    cuda_graph: bool = True
    """On CUDA, launch each step as one CUDA graph; without it the host is slower than the device."""
    scan_backend: str = "auto"
    state_every_s: float = 120.0
    """Seconds between saved states."""
    stop_after_s: float = math.inf
    """Save a state and stop after this many seconds; the same command goes on."""
    log_every: int = 50
    """Steps between log lines; only these wait for the device."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adam_betas", tuple(self.adam_betas))
        for name in ("resolution", "num_views", "num_images", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; at least 1 is accepted")
        for name in ("learning_rate", "max_grad_norm", "state_every_s", "stop_after_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; more than 0 is accepted")
        for name in ("warmup_images", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; at least 0 is accepted")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} given; 0 to below 1 is accepted")
        if self.learning_rate_schedule not in ("constant", "cosine"):
            raise ValueError(
                f"learning_rate_schedule: {self.learning_rate_schedule!r} given; "
                "constant or cosine is accepted"
            )
        if self.compile not in _COMPILE_MODES:
            raise ValueError(
                f"compile: {self.compile!r} given; one of {', '.join(_COMPILE_MODES)} is accepted"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """A configuration from plain values, as a recipe holds them; unknown and missing fields raise
        ValueError.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: unknown field; a training run has {', '.join(known)}")
        missing = [
            name
            for name, f in known.items()
            if name not in fields
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{missing[0]}: missing; a training run needs {', '.join(missing)}")
        return cls(**fields)

    def network_config(self, *, num_classes: int, downsampling: int, in_channels: int) -> LaMambaConfig:
        """The network for this data and autoencoder."""
        fields = dict(self.network)
        fields |= {"num_classes": fields.get("num_classes", num_classes), "in_channels": in_channels}
        fields |= {"sample_size": self.resolution // downsampling}
        preset = fields.pop("preset", None)
        return LaMambaConfig.preset(preset, **fields) if preset else LaMambaConfig.from_dict(fields)


class Trainer:
    """The state of a run and its step; `load_state_dict` before the first step continues another run."""

    def __init__(self, config: TrainConfig, data: LatentCache, network: LaMambaDiff) -> None:
        self.config, self.data, self.network = config, data, network
        self.device = data.labels.device
        self.images_seen = 0
        self.tables = LossTables.from_schedule(NoiseSchedule.linear(), self.device)
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self._on_cuda = self.device.type == "cuda"
        self.optimizer = AveragedAdamW(
            list(network.parameters()),
            list(self.ema.parameters()),
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            average_decay=config.ema_decay,
            captured=config.cuda_graph and self._on_cuda,
        )
        self._loss = self._compiled_loss()
        self._captured_step: CapturedStep[dict[str, Tensor]] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.images_seen // self.config.batch_size

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the losses and the gradient norm as device scalars, which the next step
        may overwrite.
        """
        if self.config.cuda_graph and self._on_cuda and self._captured_step is None:
            self._captured_step = CapturedStep(self._step, self.optimizer.state())
        torch.manual_seed((self.config.seed * _SEED_STRIDE + self.images_seen) % 2**63)
        self.optimizer.schedule(learning_rate=self._learning_rate(), step=self.step)
        losses = (self._captured_step or self._step)()
        self.images_seen += self.config.batch_size
        return losses

    def _step(self) -> dict[str, Tensor]:
        """What a CUDA graph can hold of a step: all but the host's counting."""
        x0, labels = self.data.sample(self.config.batch_size)
        t = torch.randint(len(self.tables.sqrt_abar), labels.shape, device=self.device)
        loss, mse, vb = self._loss(x0, labels, t, torch.randn_like(x0))
        loss.backward()
        grad_norm = self.optimizer.step()
        return {"loss": loss.detach(), "mse": mse.detach(), "vb": vb.detach(), "grad_norm": grad_norm}

    def _mean_losses(
        self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_t = q_sample(x0, noise, t, self.tables)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._on_cuda):
            output = self.network(x_t, timestep=t, class_labels=labels).sample
        losses = diffusion_loss(output.float(), x0, x_t, noise, t, self.tables)
        return losses.loss.mean(), losses.mse.mean(), losses.vb.mean()

    def _compiled_loss(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        if self.config.compile == "none" or not self._on_cuda:
            return self._mean_losses
        if self.config.compile == "full":
            return torch.compile(self._mean_losses, dynamic=False, fullgraph=True)
        from torch._dynamo import config as dynamo_config  # seconds to import, like all of the compiler

        self.network.compile_repeated_blocks(dynamic=False, fullgraph=True)
        return dynamo_config.patch(recompile_limit=_MAX_DISTINCT_BLOCKS)(self._mean_losses)

    def _learning_rate(self) -> float:
        peak, seen = self.config.learning_rate, self.images_seen + self.config.batch_size
        if seen < self.config.warmup_images:
            return peak * seen / self.config.warmup_images
        if self.config.learning_rate_schedule == "constant":
            return peak
        progress = (seen - self.config.warmup_images) / (self.config.num_images - self.config.warmup_images)
        return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "images_seen": self.images_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.images_seen = int(state["images_seen"])
        self._captured_step = None  # it would go on with the old moments


def train(config: TrainConfig, *, device: torch.device | str | None = None) -> Path | None:
    """Run, or go on with, the run of `config`; the exported model folder, or None when `stop_after_s` came
    first.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_config(config, output_dir / "config.json")
    started = time.monotonic()
    with _progress() as progress:
        places = Places.load(device=device)
        autoencoder = Autoencoder.load(
            config.autoencoder,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            micro_batch_pixels=_ENCODING_PIXELS,
        )
        data = places_latents(
            places,
            autoencoder,
            size=config.resolution,
            num_views=config.num_views,
            folder=output_dir / "latents",
            progress=progress,
        )
        trainer = _start(config, data, places, device)
        finished = _loop(trainer, output_dir, progress, deadline=started + config.stop_after_s)
    if not finished:
        return None
    folder = output_dir / "model"
    save_model_folder(
        folder,
        network=trainer.ema,
        autoencoder=Path(config.autoencoder),
        labels=places.labels,
        name=config.name,
    )
    logger.info("exported %s after %d images", folder, trainer.images_seen)
    return folder


def _start(config: TrainConfig, data: LatentCache, places: Places, device: torch.device) -> Trainer:
    architecture = config.network_config(
        num_classes=len(places.labels),
        downsampling=data.autoencoder.downsampling,
        in_channels=data.autoencoder.latent_channels,
    )
    torch.manual_seed(config.seed)
    network = LaMambaDiff(**dataclasses.asdict(architecture))
    if config.initial_weights is not None:
        network = load_network(config.initial_weights)
        if network.architecture != architecture:
            raise ValueError(
                f"initial_weights: {config.initial_weights} holds {network.architecture}; "
                f"{architecture} is accepted"
            )
    network.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides `self` from the checker
    network.use_scan_backend(resolve_scan_backend(config.scan_backend, device))
    trainer = Trainer(config, data, network.train())
    logger.info(
        "%s: %.2f M parameters, scan %s, %s",
        config.name,
        sum(p.numel() for p in network.parameters()) / 1e6,
        network.scan_backend,
        device,
    )
    state = load_newest_state(Path(config.output_dir) / "states", device)
    if state is not None:
        trainer.load_state_dict(state)
    return trainer


def _loop(trainer: Trainer, output_dir: Path, progress: Progress, *, deadline: float) -> bool:
    """Train to `num_images`; False when the deadline came first. A state is saved on every way out."""
    config, states = trainer.config, output_dir / "states"
    task = progress.add_task(config.name, total=config.num_images, completed=trainer.images_seen)
    saved_at, logged_at, logged_images = time.monotonic(), time.monotonic(), trainer.images_seen
    try:
        while trainer.images_seen < config.num_images:
            losses = trainer.train_step()
            if trainer.step % config.log_every == 0 or trainer.images_seen >= config.num_images:
                values = {name: round(float(value), 5) for name, value in losses.items()}
                now = time.monotonic()
                speed = (trainer.images_seen - logged_images) / (now - logged_at)
                logged_at, logged_images = now, trainer.images_seen
                _log(output_dir / "log.jsonl", trainer, values, speed)
                note = f"{config.name}  loss {values['loss']:.4f}  {speed:.0f} images/s"
                progress.update(task, completed=trainer.images_seen, description=note)
                if now - saved_at > config.state_every_s:
                    save_state(states, trainer.images_seen, trainer.state_dict())
                    saved_at = now
                if now > deadline:
                    return False
        return True
    finally:
        save_state(states, trainer.images_seen, trainer.state_dict())


def _log(path: Path, trainer: Trainer, values: dict[str, float], images_per_second: float) -> None:
    record = {
        "images": trainer.images_seen,
        **values,
        "skipped_steps": int(trainer.optimizer.skipped_steps),
        "images_per_second": round(images_per_second, 1),
    }
    if trainer.device.type == "cuda":
        record["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(trainer.device) / 2**30, 2)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    logger.info("%s", json.dumps(record))


def _write_config(config: TrainConfig, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        old = json.loads(path.read_text(encoding="utf-8"))
        new = json.loads(json.dumps(dataclasses.asdict(config)))
        for key in _FIXED_FIELDS:
            if old.get(key) != new[key]:
                raise ValueError(
                    f"{key}: {new[key]!r} given; the run in {path.parent} was started with {old.get(key)!r}, "
                    "continue with that or choose another output_dir"
                )
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
