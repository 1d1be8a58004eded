"""Training LaMamba-Diff on latents: noise, network, loss, AdamW, EMA (paper section 4.1, DiT's recipe).

Progress is counted in images. The random numbers of a step are a function of (seed, images seen) alone, so a
resumed run continues exactly without stored generator states. Parameters, EMA and scan state are fp32; the
network runs under bf16 autocast on CUDA. A step whose gradients are not finite changes nothing, the EMA
included, and is counted.

On CUDA a whole step, from drawing latents to the EMA, is one CUDA graph, and the blocks are compiled. The
compiler keeps its results in TORCHINDUCTOR_CACHE_DIR: with a folder that lasts, or one copied from another
machine of the same kind, the next run starts several times faster.

A run's folder (`output_dir`) holds `config.json` (the resolved configuration), `states/` (resumable),
`log.jsonl`, and at the end `model/`: the EMA weights as the folder that the service loads. The same command
resumes. States are saved between steps alone: also on Ctrl-C and SIGTERM, but not after a fault, which would
hide behind the fault of saving.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.progress import Progress
from torch import Tensor, nn

from model.autoencoder import Autoencoder
from model.averaged_adamw import AveragedAdamW
from model.checkpoint import load_newest_state, save_state
from model.cuda_graph import CapturedStep
from model.data.latents import LatentCache, places_latents
from model.data.places import Places
from model.device import make_current, resolve_device
from model.diffusion.loss import LossTables, diffusion_loss, q_sample
from model.diffusion.schedule import NoiseSchedule
from model.model_folder import load_network, local_folder, save_model_folder, write_json
from model.network.compiled_blocks import with_compiled_blocks
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend
from model.preview import fit_preview_map, write_preview_map
from model.progress import progress_display
from model.stop_request import StopRequest
from model.train_config import TrainConfig

__all__ = ["Trainer", "train"]

logger = logging.getLogger(__name__)

# Pixels encoded at a time: 256 images of 256 px, about 6 GB of activations in bf16.
_ENCODING_PIXELS = 2**24
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that seeds and image counts never meet in one generator seed
_PREVIEW_VIEWS = 64  # that the preview map is fitted to: 16,384 latent pixels at 128 px, for 15 unknowns
_SCALING_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


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
        return with_compiled_blocks(self.network, self._mean_losses, dynamic=False)

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

    Ctrl-C or SIGTERM during the training steps ends the program after the step: with a saved state, and with
    exit code 130 or 143. A second one ends it at once.
    """
    device = resolve_device(device)
    make_current(device)
    output_dir = Path(config.output_dir)
    started = time.monotonic()
    state = load_newest_state(output_dir / "states")
    module = Autoencoder.load(config.autoencoder_source).module
    run = {"config": config.to_dict(), "autoencoder": _fingerprint(module)}
    if state is not None:
        _require_same_run(config, run, state["run"])
    with progress_display() as progress:
        places = Places.load(device=device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        nn.Module.to(module, device=device, dtype=dtype)  # torch's own: diffusers' warns at every cast
        data = places_latents(
            places,
            Autoencoder(module, micro_batch_pixels=_ENCODING_PIXELS),
            size=config.resolution,
            num_views=config.num_views,
            folder=output_dir / "latents",
            progress=progress,
        )
        trainer = _start(config, data, places, device)
        if state is not None:
            trainer.load_state_dict(state)
            state = None  # frees the host's memory
        write_json(output_dir / "config.json", run["config"])
        if not _loop(trainer, run, output_dir, progress, deadline=started + config.stop_after_s):
            return None
    folder = output_dir / "model"
    save_model_folder(
        folder,
        network=trainer.ema,
        autoencoder=local_folder(config.autoencoder_source),
        labels=places.labels,
        name=config.name,
        gpu_dtype=config.gpu_dtype,
    )
    latents = data.autoencoder.latents(data.moments[:_PREVIEW_VIEWS])  # (n, C, h, w)
    write_preview_map(folder, fit_preview_map(latents, data.autoencoder.decode(latents))[0])
    logger.info("exported %s after %d images", folder, trainer.images_seen)
    return folder


def _start(config: TrainConfig, data: LatentCache, places: Places, device: torch.device) -> Trainer:
    architecture = config.network_config(
        num_classes=len(places.labels),
        downsampling=data.autoencoder.downsampling,
        in_channels=data.autoencoder.latent_channels,
    )
    torch.manual_seed(config.seed)
    if config.initial_weights is None:
        network = LaMambaDiff(**dataclasses.asdict(architecture))
    else:
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
    return trainer


def _loop(
    trainer: Trainer, run: dict[str, Any], output_dir: Path, progress: Progress, *, deadline: float
) -> bool:
    """Train to `num_images`; False when the deadline came first. `run` is kept in each state."""
    config = trainer.config

    def save() -> None:
        save_state(output_dir / "states", trainer.images_seen, trainer.state_dict() | {"run": run})

    task = progress.add_task(config.name, total=config.num_images, completed=trainer.images_seen)
    saved_at, logged_at, logged_images = time.monotonic(), time.monotonic(), trainer.images_seen
    with StopRequest() as stop:
        while trainer.images_seen < config.num_images:
            losses = trainer.train_step()
            finished = trainer.images_seen >= config.num_images
            if trainer.step % config.log_every == 0 or finished:
                values = {name: round(float(value), 5) for name, value in losses.items()}
                now = time.monotonic()
                speed = (trainer.images_seen - logged_images) / (now - logged_at)
                logged_at, logged_images = now, trainer.images_seen
                _log(output_dir / "log.jsonl", trainer, values, speed)
                note = f"{config.name}  loss {values['loss']:.4f}  {speed:.0f} images/s"
                progress.update(task, completed=trainer.images_seen, description=note)
                if finished or now > deadline or now - saved_at > config.state_every_s:
                    save()
                    saved_at = now
                if now > deadline and not finished:
                    return False
            if stop.received is not None:
                save()
                logger.info(
                    "%s: stopped after %d images; the same command goes on",
                    stop.received.name,
                    trainer.images_seen,
                )
                raise SystemExit(stop.exit_code)
    return True


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


def _require_same_run(config: TrainConfig, run: dict[str, Any], earlier: dict[str, Any]) -> None:
    """ValueError unless `run` may go on from the state of `earlier`; what it changes is logged."""
    changes = config.changes_since(earlier["config"])
    if run["autoencoder"] != earlier["autoencoder"]:
        raise ValueError(
            f"autoencoder: {config.autoencoder} with weights {run['autoencoder']} given; the run in "
            f"{config.output_dir} learns the latents of {earlier['config']['autoencoder']} with weights "
            f"{earlier['autoencoder']}, continue with those or choose another output_dir"
        )
    for name, (before, now) in changes.items():
        logger.info("%s: %r from here on, %r before", name, now, before)


def _fingerprint(module: AutoencoderKL) -> str:
    """16 hex digits of all that latents depend on: the weights, as stored, and the scaling."""
    scaling = json.dumps({name: module.config.get(name) for name in _SCALING_FIELDS})
    weights = Autoencoder(module).weights_hash
    return hashlib.sha256(f"{weights} {scaling}".encode()).hexdigest()[:16]
