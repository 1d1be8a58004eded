"""Train a small f8 AutoencoderKL on views of places: `lamamba train-autoencoder --output-dir DIR`.

Each step renders fresh views and lowers the objective of loss.py and, against a discriminator trained beside
it, of perceptual_loss.py. Views and noise are functions of (seed, images seen): a run that is stopped goes
on from its last checkpoint by the same command. `max_seconds` counts training alone, neither start-up and
compilation nor the evaluation at the end. Outputs: config.json, log.jsonl, states/, and at the end vae/
(fp16 EMA weights, latents normalised), metrics.json and reconstructions.png. On CUDA a step is one CUDA
graph, from the views to the weights' average.

Legend: n images, C latent channels, H, W pixels, h, w latent positions.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from model.autoencoder import Autoencoder
from model.autoencoder_training.config import AutoencoderTrainingConfig, build_autoencoder
from model.autoencoder_training.loss import AutoencoderLoss, use_channels_last_group_norm
from model.autoencoder_training.measures import (
    latent_statistics,
    normalise_latents,
    point_response,
    reconstruction_metrics,
    reconstruction_picture,
)
from model.autoencoder_training.perceptual_loss import PerceptualLoss
from model.autoencoder_training.states import load_newest_state, save_state
from model.averaged_adamw import AveragedAdamW
from model.cuda_graph import CapturedStep, restored
from model.data.places import Places
from model.device import make_current, resolve_device
from model.lock_file import locked, taken
from model.stop_request import StopRequest

__all__ = ["train"]

logger = logging.getLogger(__name__)

_MAY_CHANGE_ON_RESUME = {
    "max_seconds",
    "max_images",
    "compile",
    "cuda_graph",
    "log_steps",
    "checkpoint_seconds",
    "evaluation_views",
    "statistics_views",
}


class _Run:
    """The state of a run: weights, their average, optimizer, progress; saved and restored as one file."""

    def __init__(self, config: AutoencoderTrainingConfig, output_dir: Path, device: torch.device) -> None:
        self.config, self.device = config, device
        self.states = output_dir / "states"
        self.step, self.images, self.seconds = 0, 0, 0.0
        self.module = build_autoencoder(config)
        self.module.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]  # as below
        if config.compile:
            use_channels_last_group_norm(self.module)
        if not config.train_encoder:
            for part in (self.module.encoder, self.module.quant_conv):
                part.requires_grad_(False)  # type: ignore[union-attr]  # build_autoencoder makes both
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.captured = config.cuda_graph and device.type == "cuda"
        self.optimizers = [self._optimizer(self.parameters, self.average)]
        self.perceptual: PerceptualLoss | None = None
        if config.perceptual_weight:
            self.perceptual = self._perceptual_loss()
            judges = list(self.perceptual.discriminator.parameters())
            self.optimizers.append(self._optimizer(judges, [p.detach().clone() for p in judges]))
        self._first_view = torch.zeros((), dtype=torch.int64, device=device)
        self._restore()

    @property
    def progress(self) -> float:
        """From 0 to 1, of the budget."""
        budget = self.config.max_images
        done = self.seconds / self.config.max_seconds if budget is None else self.images / budget
        return min(1.0, done)

    def prepare_step(self) -> None:
        """Set what the next step reads from the device: seed, views, learning rate, weight of the average."""
        config = self.config
        torch.manual_seed(config.seed * 2**32 + self.step)
        self._first_view.fill_(self.images)
        warmup = min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        for optimizer in self.optimizers:
            optimizer.schedule(learning_rate=config.learning_rate * warmup * cosine, step=self.step)

    def batch(self, places: Places) -> tuple[Tensor, Tensor]:
        """Images (n, 3, crop, crop), channels last, their sizes in turn, and noise (n, C, h, w)."""
        config, device = self.config, self.device
        ids = self._first_view + torch.arange(config.batch_size, device=device)
        views = []
        for turn, size in enumerate(config.sizes):
            part, _ = places.render(ids[turn :: len(config.sizes)], size)
            views.append(_random_crops(part, config.crop))
        images = torch.stack(views, dim=1).flatten(0, 1)
        side = config.crop // 2 ** (len(config.block_out_channels) - 1)
        noise = torch.randn(config.batch_size, config.latent_channels, side, side, device=device)
        return images.contiguous(memory_format=torch.channels_last), noise

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes in place."""
        return [tensor for optimizer in self.optimizers for tensor in optimizer.state()]

    def averaged_module(self) -> AutoencoderKL:
        """A plain module with the averaged weights."""
        module = build_autoencoder(self.config)
        module.to(self.device)  # type: ignore[arg-type]  # diffusers' wrapper of `to` hides its signature
        module.load_state_dict(dict(zip(self.trained, self.average, strict=True)), strict=False)
        return module

    def save(self) -> None:
        """Keep the present state, whole or not at all."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        if self.perceptual is not None:
            state["discriminator"] = self.perceptual.discriminator.state_dict()
        save_state(self.states, self.images, state)

    def _optimizer(self, parameters: list[nn.Parameter], average: list[Tensor]) -> AveragedAdamW:
        config = self.config
        return AveragedAdamW(
            parameters,
            average,
            betas=(0.5, 0.99),  # as GANs are trained
            max_grad_norm=config.max_grad_norm,
            average_decay=config.ema_decay,
            captured=self.captured,
        )

    def _perceptual_loss(self) -> PerceptualLoss:
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            loss = PerceptualLoss(
                perceptual_weight=self.config.perceptual_weight,
                adversarial_ratio=self.config.adversarial_ratio,
            )
        loss.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return loss

    def _restore(self) -> None:
        state = load_newest_state(self.states)
        if state is None:
            return
        for name, value in asdict(self.config).items():
            if name not in _MAY_CHANGE_ON_RESUME and state["config"][name] != value:
                raise ValueError(
                    f"{name}: {value} given; {self.states} accepts {state['config'][name]}, "
                    "with which it began"
                )
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.perceptual is not None:
            self.perceptual.discriminator.load_state_dict(state["discriminator"])
        torch._foreach_copy_(self.average, state["average"])
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        logger.info("resumed at step %d, %.1f s, %d images", self.step, self.seconds, self.images)


def train(
    config: AutoencoderTrainingConfig, output_dir: Path, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Run, or go on with the run that `output_dir` holds; returns what metrics.json says.

    SIGINT, SIGTERM or SIGUSR1 during the steps ends the program after the step, with a saved state and with
    exit code 128 + the signal's number. Raises ValueError where another run has the folder.
    """
    device = resolve_device(device)
    make_current(device)
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked(output_dir / ".lock") as has_folder:
        if not has_folder:
            raise taken(output_dir)
        run = _Run(config, output_dir, device)
        (output_dir / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        places = Places.load(device=device)
        if run.progress < 1:
            cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=True)
            with StopRequest(at_once=True) as stop, cudnn:
                _optimise(run, places, output_dir / "log.jsonl", stop)
            run.save()
        return _export(run, places, output_dir)


def _ready_step(run: _Run, places: Places) -> Callable[[], Tensor]:
    """A function that takes one step and returns the loss's terms, in the order of `_terms`, and `skipped`.

    It is ready to run at full speed: compiled, and on CUDA captured.
    """
    config, perceptual = run.config, run.perceptual
    loss_function = AutoencoderLoss(run.module, config)
    compiled = (
        torch.compile(loss_function, fullgraph=True, dynamic=False) if config.compile else loss_function
    )

    def step() -> Tensor:
        images, noise = run.batch(places)
        loss, terms, reconstructions = compiled(images, noise)
        if perceptual is not None:
            perceptual_loss, perceptual_terms = perceptual(images, reconstructions)
            loss, terms = loss + perceptual_loss, torch.cat((terms, perceptual_terms))
        loss.backward()
        for optimizer in run.optimizers:
            optimizer.step()
        return torch.cat((terms, torch.stack([o.skipped for o in run.optimizers]).amax(dim=0, keepdim=True)))

    if run.captured:
        return CapturedStep(step, run.state())
    with restored(run.state()):
        step()
    return step


def _terms(run: _Run) -> tuple[str, ...]:
    return AutoencoderLoss.TERMS if run.perceptual is None else AutoencoderLoss.TERMS + PerceptualLoss.TERMS


def _optimise(run: _Run, places: Places, log_path: Path, stop: StopRequest) -> None:
    """Steps until the budget is spent; the host waits for the device only to log and to save."""
    config = run.config
    started = time.perf_counter()
    step, names = _ready_step(run, places), _terms(run)
    _synchronise(run.device)
    logger.info("ready after %.1f s", time.perf_counter() - started)

    resumed_seconds, started = run.seconds, time.perf_counter()
    logged_step, logged_images = run.step, run.images
    logged_seconds = saved_seconds = run.seconds
    totals = torch.zeros(len(names) + 1, device=run.device)
    stop.at_once = False
    while run.progress < 1:
        run.prepare_step()
        totals += step()
        run.step += 1
        run.images += config.batch_size
        run.seconds = resumed_seconds + time.perf_counter() - started
        if run.step % config.log_steps == 0 or run.progress >= 1:
            *means, skipped = (totals / (run.step - logged_step)).tolist()  # waits for the device
            totals.zero_()
            run.seconds = resumed_seconds + time.perf_counter() - started
            rate = (run.images - logged_images) / (run.seconds - logged_seconds)
            logged_step, logged_images, logged_seconds = run.step, run.images, run.seconds
            _log(log_path, run, rate, dict(zip(names, means, strict=True)), skipped)
        if stop.received or run.seconds - saved_seconds >= config.checkpoint_seconds:
            saved_seconds = run.seconds
            run.save()
        if stop.received:
            logger.info(
                "%s: stopped after %d images; the same command goes on", stop.received.name, run.images
            )
            raise SystemExit(stop.exit_code)


def _log(path: Path, run: _Run, rate: float, terms: dict[str, float], skipped: float) -> None:
    row = {"step": run.step, "images": run.images, "seconds": round(run.seconds, 2)}
    psnr = 10 * math.log10(4) - 10 * terms["log_mse"] / math.log(10)  # of the training views
    row |= {"images_per_s": round(rate, 1), "psnr": round(psnr, 2), "skipped": skipped} | terms
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
    done = 100 * run.progress
    logger.info("%3.0f %%  step %d  %.0f images/s  %.2f dB  %s", done, run.step, rate, psnr, shown)
    if skipped == 1:
        raise FloatingPointError(f"gradients: none finite in the steps up to {run.step}; lower learning_rate")


def _export(run: _Run, places: Places, output_dir: Path) -> dict[str, Any]:
    """Write vae/, metrics.json and reconstructions.png; all is measured with the weights as written."""
    config, sizes = run.config, tuple(sorted(run.config.sizes))
    module = run.averaged_module()
    raw = latent_statistics(Autoencoder(module), places, sizes=sizes, num_views=config.statistics_views)
    if config.train_encoder:
        normalise_latents(module, mean=raw["mean"], std=raw["std"])
    module.half().save_pretrained(output_dir / "vae")

    autoencoder = Autoencoder.load(output_dir / "vae", run.device)
    bf16 = Autoencoder.load(output_dir / "vae", run.device, torch.bfloat16)
    metrics: dict[str, Any] = {
        "reconstruction": _reconstruction(autoencoder, places, config),
        "reconstruction_bf16": _reconstruction(bf16, places, config),
        "latents_before_normalisation": {"mean": raw["mean"], "std": raw["std"]},
        "latents": latent_statistics(autoencoder, places, sizes=sizes, num_views=config.statistics_views),
        "point_response": {
            str(size): point_response(
                autoencoder, places, size=size, num_views=min(64, config.evaluation_views)
            )
            for size in sizes
        },
        "parameters": sum(parameter.numel() for parameter in run.module.parameters()),
        "steps": run.step,
        "images": run.images,
        "seconds": round(run.seconds, 1),
        "images_per_s": round(run.images / max(run.seconds, 1e-9), 1),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
    }
    Image.fromarray(reconstruction_picture(autoencoder, places, sizes=sizes)).save(
        output_dir / "reconstructions.png"
    )
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    logger.info("metrics: %s", json.dumps(metrics))
    return metrics


def _reconstruction(
    autoencoder: Autoencoder, places: Places, config: AutoencoderTrainingConfig
) -> dict[str, dict[str, float]]:
    """Reconstruction metrics by size."""
    return {
        str(size): reconstruction_metrics(autoencoder, places, size=size, num_views=config.evaluation_views)
        for size in sorted(config.sizes)
    }


def _random_crops(images: Tensor, side: int) -> Tensor:
    """A square of `side` pixels of each image (n, 3, S, S), each at a place of its own."""
    n, _, size, _ = images.shape
    if size == side:
        return images
    ramp = torch.arange(side, device=images.device)
    rows, columns = torch.randint(size - side + 1, (2, n, 1), device=images.device) + ramp  # (n, side) each
    image = torch.arange(n, device=images.device)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
