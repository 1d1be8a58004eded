"""A training run, from its configuration to the exported model: data, steps, saved states, the log.

Progress is counted in images. A run's folder (`output_dir`) holds `config.json` (the resolved configuration),
`states/` (resumable), `log.jsonl`, and at the end `model/`: the EMA weights as the folder that the service
loads. The same command resumes. States are saved between steps alone: also on Ctrl-C and SIGTERM, but not
after a fault, which would hide behind the fault of saving.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.progress import Progress
from torch import nn

from model.autoencoder import Autoencoder
from model.checkpoint import load_newest_state, save_state
from model.data.latents import places_latents
from model.data.places import Places
from model.device import make_current, resolve_device
from model.model_folder import local_folder, save_model_folder, write_json
from model.preview import fit_preview_map, write_preview_map
from model.progress import progress_display
from model.stop_request import StopRequest
from model.training.config import TrainConfig
from model.training.network import build_network
from model.training.trainer import Trainer

__all__ = ["train"]

logger = logging.getLogger(__name__)

# Pixels encoded at a time: 256 images of 256 px, about 6 GB of activations in bf16.
_ENCODING_PIXELS = 2**24
_PREVIEW_VIEWS = 64  # that the preview map is fitted to: 16,384 latent pixels at 128 px, for 15 unknowns
_SCALING_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


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
        network = build_network(
            config, num_classes=len(places.labels), autoencoder=data.autoencoder, device=device
        )
        trainer = Trainer(config, data, network)
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
