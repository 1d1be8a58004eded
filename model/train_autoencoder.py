"""Train a small f8 AutoencoderKL on views of places: `python -m model.train_autoencoder --output-dir DIR`.

Each step renders fresh views at one of the sizes in turn and lowers, averaged over images x and their
reconstructions y from one posterior sample,
    |x - y| + gradient |grad(x - y)| at three scales + log_mse log(mean (x - y)^2)   (the last is -PSNR)
    + energy (excess of |log gradient energy of y over that of x| over 0.05)
    + kl KL(posterior, N(0, 1)) per latent + outlier (excess of |z| over `outlier_sigmas` deviations)^2
The energy term keeps y as sharp as x, where the terms before it prefer soft pictures. The outlier term keeps
the encoder from marking places with huge latents, which no diffusion model reproduces.

Views and noise are functions of (seed, images seen): a run that is stopped goes on from its last checkpoint
by the same command. `max_seconds` counts training alone, neither start-up and compilation nor the evaluation
at the end. Outputs: config.json, log.jsonl, checkpoint.pt, and at the end vae/ (fp16 EMA weights, latents
normalised), metrics.json and reconstructions.png.

Legend: n images, C latent channels, H, W pixels, h, w latent positions.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model.autoencoder import Autoencoder
from model.data.places import Places
from model.evaluate_autoencoder import (
    gradient_energy,
    latent_statistics,
    normalise_latents,
    reconstruction_metrics,
    reconstruction_picture,
)

__all__ = ["AutoencoderLoss", "AutoencoderTrainingConfig", "build_autoencoder", "train"]

logger = logging.getLogger(__name__)

_MAY_CHANGE_ON_RESUME = {
    "max_seconds",
    "max_images",
    "compile",
    "log_steps",
    "checkpoint_seconds",
    "evaluation_views",
    "statistics_views",
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig:
    """What a run does; written to its config.json."""

    block_out_channels: tuple[int, ...] = (32, 64, 96, 128)
    """Widths of the stages; each but the last halves the resolution."""
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 8
    sizes: tuple[int, ...] = (128, 256)
    """Sides of the views in pixels, one a step, in turn."""
    batch_sizes: tuple[int, ...] = (128, 32)
    """Images a step at each of `sizes`."""
    max_seconds: float = 450.0
    """Training time; the learning rate falls to 0 over it."""
    max_images: int | None = None
    """If given, this many images end the run instead of `max_seconds`."""
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_weight: float = 1.0
    log_mse_weight: float = 0.02
    energy_weight: float = 0.03
    kl_weight: float = 1e-3
    """Per latent element, beside losses per pixel: independent of the image's size."""
    outlier_weight: float = 0.1
    outlier_sigmas: float = 3.0
    seed: int = 0
    compile: bool = True
    log_steps: int = 200
    checkpoint_seconds: float = 60.0
    evaluation_views: int = 500
    statistics_views: int = 4096

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.batch_sizes) or not self.sizes or min(self.batch_sizes) < 1:
            raise ValueError(
                f"batch_sizes: {self.batch_sizes} given; accepted is one positive number for each of sizes "
                f"{self.sizes}"
            )
        factor = 2 ** (len(self.block_out_channels) - 1)
        if any(size < factor or size % factor for size in self.sizes):
            raise ValueError(f"sizes: {self.sizes} given; accepted are positive multiples of {factor}")
        if any(width < 1 or width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"block_out_channels: {self.block_out_channels} given; accepted are positive multiples of "
                f"norm_num_groups, {self.norm_num_groups}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} given; accepted is 0 or more and less than 1")
        for name in ("max_seconds", "learning_rate", "max_grad_norm", "log_steps", "outlier_sigmas"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; accepted is more than 0")
        for name in (
            "gradient_weight",
            "log_mse_weight",
            "energy_weight",
            "kl_weight",
            "outlier_weight",
            "warmup_steps",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; accepted is 0 or more")


def build_autoencoder(config: AutoencoderTrainingConfig) -> AutoencoderKL:
    """A freshly initialised fp32 AutoencoderKL without attention, a function of the config and its seed."""
    stages = len(config.block_out_channels)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            sample_size=max(config.sizes),
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    # Begin with narrow posteriors (std exp(-2)): behind wide ones the decoder learns to ignore the latents.
    nn.init.constant_(module.quant_conv.bias[config.latent_channels :], -4.0)
    return module


class ChannelsLastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` as sums over positions, then over channels.

    In channels-last memory both passes read whole rows, and compiled they fuse with the activation around
    them; torch's own decomposition walks such a tensor channel by channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        n, channels = input.shape[:2]
        x = input.float()
        moments = torch.stack((x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))))  # (2, n, channels)
        mean, square = moments.view(2, n, self.num_groups, -1).mean(dim=3, keepdim=True)  # (n, groups, 1)
        inverse_std = torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        scale = self.weight.view(self.num_groups, -1) * inverse_std  # (n, groups, channels / groups)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        return x * scale.view(n, channels, 1, 1) + shift.view(n, channels, 1, 1)


def use_channels_last_group_norm(module: nn.Module) -> None:
    """Replace each `nn.GroupNorm` in `module` by a `ChannelsLastGroupNorm` of the same parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                norm = ChannelsLastGroupNorm(child.num_groups, child.num_channels, child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)


class AutoencoderLoss(nn.Module):
    """The module header's objective: images (n, 3, H, W) and noise (n, C, h, w) -> loss, its `TERMS` (6,)."""

    TERMS = ("l1", "gradient", "log_mse", "energy", "kl", "outlier")

    def __init__(self, module: AutoencoderKL, config: AutoencoderTrainingConfig) -> None:
        super().__init__()
        if module.quant_conv is None or module.post_quant_conv is None:
            raise ValueError("module: has no quant_conv and post_quant_conv; accepted is one that has both")
        self.module, self.to_moments, self.from_latents = module, module.quant_conv, module.post_quant_conv
        reconstruction = (1.0, config.gradient_weight, config.log_mse_weight, config.energy_weight)
        self.weights = (*reconstruction, config.kl_weight, config.outlier_weight)
        self.outlier_sigmas = config.outlier_sigmas

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            moments = self.to_moments(module.encoder(images)).float()
            mean, log_variance = moments.chunk(2, dim=1)  # (n, C, h, w)
            log_variance = log_variance.clamp(-30, 20)
            z = mean + torch.exp(0.5 * log_variance) * noise
            error = module.decoder(self.from_latents(z)).float() - images
        centre = mean.mean(dim=(0, 2, 3), keepdim=True)
        sigma = (mean - centre).square().mean(dim=(0, 2, 3), keepdim=True).sqrt().detach() + 1e-6
        excess = F.relu((mean - centre.detach()).abs() / sigma - self.outlier_sigmas)
        terms = torch.stack(
            (
                error.abs().mean(),
                _gradient_error(error),
                torch.log(error.square().mean(dim=(1, 2, 3)) + 1e-5).mean(),
                _energy_error(images, images + error),
                0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
                excess.square().mean(),
            )
        )
        return sum(w * term for w, term in zip(self.weights, terms, strict=True)), terms.detach()


def _gradient_error(error: Tensor, num_scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring errors, averaged over scales that halve the resolution."""
    total = error.new_zeros(())
    for scale in range(num_scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return total / num_scales


def _energy_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean over images of how far the logarithm of their gradient energies' ratio leaves -0.05..0.05."""
    pixels = images[0].numel()
    ratio = (gradient_energy(reconstructions) / pixels + 1e-4) / (gradient_energy(images) / pixels + 1e-4)
    return F.relu(torch.log(ratio).abs() - 0.05).mean()


class _Run:
    """The state of a run: weights, their average, optimizer, progress; saved and restored as one file."""

    def __init__(self, config: AutoencoderTrainingConfig, output_dir: Path, device: torch.device) -> None:
        self.config, self.device = config, device
        self.path = output_dir / "checkpoint.pt"
        self.step, self.images, self.seconds = 0, 0, 0.0
        self.module = build_autoencoder(config)
        self.module.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]  # as below
        if config.compile:
            use_channels_last_group_norm(self.module)
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        if self.path.exists():
            self._restore()
        else:
            self.average = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def progress(self) -> float:
        """From 0 to 1, of the budget."""
        budget = self.config.max_images
        done = self.seconds / self.config.max_seconds if budget is None else self.images / budget
        return min(1.0, done)

    def batch(self, places: Places) -> tuple[Tensor, Tensor]:
        """The next step's images (n, 3, H, W), channels last, and posterior noise (n, C, h, w)."""
        config = self.config
        turn = self.step % len(config.sizes)
        size, count = config.sizes[turn], config.batch_sizes[turn]
        ids = torch.arange(self.images, self.images + count, device=self.device)
        images, _ = places.render(ids, size)
        generator = torch.Generator(self.device).manual_seed(config.seed * 2**32 + self.step)
        latent_size = size // 2 ** (len(config.block_out_channels) - 1)
        shape = (count, config.latent_channels, latent_size, latent_size)
        noise = torch.randn(shape, generator=generator, device=self.device)
        return images.contiguous(memory_format=torch.channels_last), noise

    def update(self) -> Tensor:
        """Apply the gradients that lie on the parameters, unless one is not finite: then return 1, else 0."""
        warmup = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * warmup * cosine
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        skipped = (~torch.isfinite(norm)).float()
        # The fused step reads this on the device, as GradScaler sets it: no wait for the host.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))  # forgets the first weights
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(self.average, self.parameters, self.step)
        return skipped

    def averaged_module(self) -> AutoencoderKL:
        """A plain module with the averaged weights."""
        module = build_autoencoder(self.config)
        module.to(self.device)  # type: ignore[arg-type]  # diffusers' wrapper of `to` hides its signature
        names = (name for name, _ in self.module.named_parameters())
        module.load_state_dict(dict(zip(names, self.average, strict=True)))
        return module

    def save(self) -> None:
        """Replace the checkpoint by the present state, whole or not at all."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)

    def _restore(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        for name, value in asdict(self.config).items():
            if name not in _MAY_CHANGE_ON_RESUME and state["config"][name] != value:
                raise ValueError(
                    f"{name}: {value} given; {self.path} accepts {state['config'][name]}, with which it began"
                )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        logger.info("resumed at step %d, %.1f s, %d images", self.step, self.seconds, self.images)


def train(config: AutoencoderTrainingConfig, output_dir: Path, device: torch.device | str) -> dict[str, Any]:
    """Run, or go on with the run that `output_dir` holds; returns what metrics.json says."""
    device = torch.device(device)
    output_dir.mkdir(parents=True, exist_ok=True)
    run = _Run(config, output_dir, device)
    (output_dir / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    places = Places.load(device=device)
    if run.progress < 1:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            _optimise(run, places, output_dir / "log.jsonl")
        run.save()
    return _export(run, places, output_dir)


def _optimise(run: _Run, places: Places, log_path: Path) -> None:
    """Steps until the budget is spent; the host waits for the device only to log and to save."""
    config = run.config
    loss_function = AutoencoderLoss(run.module, config)
    compiled = (
        torch.compile(loss_function, fullgraph=True, dynamic=False) if config.compile else loss_function
    )
    started = time.perf_counter()
    first_step = run.step
    for run.step in range(first_step, first_step + len(config.sizes)):
        compiled(*run.batch(places))[0].backward()
    run.optimizer.zero_grad(set_to_none=True)
    run.step = first_step
    _synchronise(run.device)
    logger.info("ready after %.1f s", time.perf_counter() - started)

    resumed_seconds, started = run.seconds, time.perf_counter()
    logged_seconds, logged_images, saved_seconds = run.seconds, run.images, run.seconds
    totals = torch.zeros(len(AutoencoderLoss.TERMS) + 1, device=run.device)
    while run.progress < 1:
        images, noise = run.batch(places)
        loss, terms = compiled(images, noise)
        loss.backward()
        totals += torch.cat((terms, run.update()[None]))
        run.step += 1
        run.images += images.shape[0]
        run.seconds = resumed_seconds + time.perf_counter() - started
        if run.step % config.log_steps == 0 or run.progress >= 1:
            steps = (run.step - 1) % config.log_steps + 1
            *means, skipped = (totals / steps).tolist()  # waits for the device
            totals.zero_()
            run.seconds = resumed_seconds + time.perf_counter() - started
            rate = (run.images - logged_images) / (run.seconds - logged_seconds)
            logged_seconds, logged_images = run.seconds, run.images
            _log(log_path, run, rate, dict(zip(AutoencoderLoss.TERMS, means, strict=True)), skipped)
            if run.seconds - saved_seconds >= config.checkpoint_seconds:
                saved_seconds = run.seconds
                run.save()


def _log(path: Path, run: _Run, rate: float, terms: dict[str, float], skipped: float) -> None:
    row = {"step": run.step, "images": run.images, "seconds": round(run.seconds, 2)}
    row |= {"images_per_s": round(rate, 1), "skipped": skipped} | terms
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
    logger.info("%3.0f %%  step %d  %.0f images/s  %s", 100 * run.progress, run.step, rate, shown)
    if skipped == 1:
        raise FloatingPointError(f"gradients: none finite in the steps up to {run.step}; lower learning_rate")


def _export(run: _Run, places: Places, output_dir: Path) -> dict[str, Any]:
    """Write vae/, metrics.json and reconstructions.png; all is measured with the weights as written."""
    config = run.config
    module = run.averaged_module()
    raw = latent_statistics(
        Autoencoder(module), places, sizes=config.sizes, num_views=config.statistics_views
    )
    normalise_latents(module, mean=raw["mean"], std=raw["std"])
    module.half().save_pretrained(output_dir / "vae")

    autoencoder = Autoencoder.load(output_dir / "vae", run.device)
    bf16 = Autoencoder.load(output_dir / "vae", run.device, torch.bfloat16)
    metrics: dict[str, Any] = {
        "reconstruction": _reconstruction(autoencoder, places, config),
        "reconstruction_bf16": _reconstruction(bf16, places, config),
        "latents_before_normalisation": {"mean": raw["mean"], "std": raw["std"]},
        "latents": latent_statistics(
            autoencoder, places, sizes=config.sizes, num_views=config.statistics_views
        ),
        "parameters": sum(parameter.numel() for parameter in run.parameters),
        "steps": run.step,
        "images": run.images,
        "seconds": round(run.seconds, 1),
        "images_per_s": round(run.images / max(run.seconds, 1e-9), 1),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
    }
    Image.fromarray(reconstruction_picture(autoencoder, places, sizes=config.sizes)).save(
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
        for size in config.sizes
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Config fields from `name=value` texts, values as in JSON (lists become tuples)."""
    names = {field.name for field in fields(AutoencoderTrainingConfig)}
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise ValueError(f"set: {setting} given; accepted is NAME=VALUE with NAME in {sorted(names)}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"set: {setting} given; accepted is a value as in JSON, e.g. [1, 2]") from error
        parsed[name] = tuple(value) if isinstance(value, list) else value
    return parsed


def main(
    output_dir: Annotated[Path, typer.Option(help="folder of the run; one that holds a run is gone on with")],
    max_seconds: Annotated[float, typer.Option(help="training time")] = 450.0,
    max_images: Annotated[int | None, typer.Option(help="end after so many images instead")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
    compile: Annotated[bool, typer.Option(help="torch.compile the step")] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="any other field of the config, NAME=VALUE; repeatable")
    ] = None,
) -> None:
    """Train the autoencoder of the shipped models on views of places."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    budget = {"max_seconds": max_seconds, "max_images": max_images, "compile": compile}
    config = AutoencoderTrainingConfig(**(budget | parse_settings(settings or [])))
    train(config, output_dir, device)


if __name__ == "__main__":
    typer.run(main)
