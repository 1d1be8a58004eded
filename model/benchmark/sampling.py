"""Images from noise to pixels: guided DDPM sampling and the decoder, ours and DiT in the same loop.

The loop is the product's own (`diffusion.step.denoise_step` on `diffusion.noise`), with the whole step
(noise, network, guidance, update) as one CUDA graph that finds its place in the sampler's table itself, so
that the host waits for nothing between steps. The decoder has the configuration of sd-vae-ft-mse (83.7 M
parameters with the encoder) and random weights, channels-last. Random weights make no pictures, and take the
same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.table import Table
from torch import Tensor, nn

from model.autoencoder import Autoencoder
from model.benchmark.config import LEVELS, PRESETS, Shape, architecture, dit_architecture
from model.benchmark.environment import device_slug, environment
from model.benchmark.forward import peer_name
from model.benchmark.networks import DTYPES, EmbeddedOnce, build_dit, build_lamamba, optimize
from model.benchmark.run import compile_cache
from model.benchmark.timing import release
from model.cuda_graph import CapturedStep
from model.device import make_current
from model.diffusion.noise import gaussian_noise
from model.diffusion.samplers import SAMPLERS, SamplerTable, sampler_table
from model.diffusion.schedule import NoiseSchedule
from model.diffusion.step import DenoisingNetwork, StepBatch, denoise_step
from model.messages import one_line
from model.network.scan import resolve_scan_backend
from model.whole_file import write_json

__all__ = ["ImagesConfig", "build_vae", "images_table", "run_images_benchmark"]

GOALS = {32: 1.6, 64: 2.0, 128: 3.0}
"""Our images a second over DiT's, by side of the latents."""
PAPER = {32: 0.76, 64: 1.05, 128: 1.7}
"""The same in the paper's table 5 (8 H800)."""

_VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_TINY_VAE: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
_MICRO_BATCH_PIXELS = 2**22


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """What a run makes; ValueError names a bad field, its value and what is accepted."""

    preset: str = "XL"
    shapes: tuple[Shape, ...]
    """Images of a batch (each is two rows of the network) and the side of their latents."""
    steps: int = 250
    sampler: str = "ddpm"
    guidance_scale: float = 4.0
    numerics: str = "bf16"
    level: str | None = None
    """How both networks are compiled; None: as each is fastest, ours not at all, the peer as a whole."""
    scan_backend: str = "auto"
    repeats: int = 2
    """Batches that are timed, of each provider in turn, after one that is not."""

    def __post_init__(self) -> None:
        for field, accepted in (("preset", PRESETS), ("sampler", SAMPLERS), ("numerics", tuple(DTYPES))):
            if getattr(self, field) not in accepted:
                raise ValueError(
                    f"{field}: {getattr(self, field)!r} given; one of {', '.join(accepted)} is accepted"
                )
        if self.level is not None and self.level not in LEVELS:
            raise ValueError(f"level: {self.level!r} given; one of {', '.join(LEVELS)} is accepted")
        if not self.shapes:
            raise ValueError("shapes: none given; IMAGESxSIDE, with commas between, is accepted")
        if self.repeats < 1:
            raise ValueError(f"repeats: {self.repeats} given; 1 or more is accepted")
        if self.guidance_scale == 1.0:
            raise ValueError("guidance_scale: 1 given, which is no guidance; any other is accepted")
        for shape in self.shapes:
            architecture(self.preset, shape.side)
        sampler_table(self.sampler, self.steps, NoiseSchedule.linear())


class _Loop:
    """A batch of images on its way from noise to clean latents, with a step that takes no arguments."""

    def __init__(
        self,
        network: DenoisingNetwork,
        table: SamplerTable,
        shape: Shape,
        *,
        num_classes: int,
        guidance_scale: float,
        device: torch.device,
    ) -> None:
        self._network, self._table = network, table
        self._null_label = num_classes
        images = shape.rows
        self._latent_shape = (4, shape.side, shape.side)
        self._seeds = torch.arange(images, device=device)
        self._indices = torch.zeros(images, dtype=torch.int64, device=device)
        self._labels = torch.arange(images, device=device) % num_classes
        self._guided = torch.arange(images, device=device)
        self._scale = torch.full((images,), guidance_scale, device=device)
        self._coefficients, self._timesteps = table.coefficients.to(device), table.timesteps.to(device)
        self.latents = torch.zeros(images, *self._latent_shape, device=device)
        self._history = torch.zeros_like(self.latents)
        self._step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.restart()
        self._step: Callable[[], object] = self.step
        if device.type == "cuda":
            state = (self.latents, self._history, self._step_index)
            self._step = CapturedStep(self.step, state)

    def restart(self) -> None:
        """Pure noise, at the first step."""
        self._step_index.zero_()
        self._history.zero_()
        draws = torch.zeros_like(self._indices)
        self.latents.copy_(gaussian_noise(self._seeds, self._indices, draws, self._latent_shape))

    def step(self) -> None:
        """Move all images one step, in place."""
        images, index = len(self._labels), self._step_index
        draws = (index + 1).expand(images)
        batch = StepBatch(
            latents=self.latents,
            history=self._history,
            timesteps=self._timesteps[index].expand(images),
            coefficients=self._coefficients[index].expand(images, -1),
            class_labels=self._labels,
            guidance_scale=self._scale,
            guided=self._guided,
            noise=gaussian_noise(self._seeds, self._indices, draws, self._latent_shape)
            if self._table.stochastic
            else None,
        )
        latents, history = denoise_step(self._network, batch, null_label=self._null_label)
        self.latents.copy_(latents)
        self._history.copy_(history)
        self._step_index.add_(1)

    def run(self) -> None:
        """All steps from noise on."""
        self.restart()
        for _ in range(len(self._table.timesteps)):
            self._step()


def run_images_benchmark(
    config: ImagesConfig,
    device: torch.device,
    *,
    output_dir: Path,
    name: str | None = None,
    cache: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> tuple[Path, dict[str, Any]]:
    """Measure what `config` says; the results file, written again after every shape, and its content."""
    path = output_dir / f"{name or f'images-{device_slug(device)}'}.json"
    make_current(device)
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {}
    with torch.inference_mode(), compile_cache(cache):
        facts = environment() | {"device": str(device), "compile_cache": "kept" if cache else "cold"}
        decoder = _decoder(config, device)
        for shape in config.shapes:
            new = _measure(config, shape, decoder, device)
            for row in new:
                report(row)
            rows += new
            content = {"environment": facts, "results": rows}
            write_json(path, content)
            torch.compiler.reset()
            release(device)
    return path, content


def images_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Images a second of both, side by side."""
    table = Table(title="Images a second, guided, from noise to pixels", title_justify="left")
    for column in ("images x pixels", "ours", "DiT", "ours / DiT", "goal", "paper", "decode, of ours"):
        table.add_column(column, justify="right")
    for shape in dict.fromkeys((row["images"], row["side"]) for row in rows):
        timed = {
            row["provider"]: row
            for row in rows
            if (row["images"], row["side"]) == shape and "images_per_s" in row
        }
        ours = timed.get("lamamba")
        peer = next((row for provider, row in timed.items() if provider != "lamamba"), None)
        ratio = f"{ours['images_per_s'] / peer['images_per_s']:.2f}x" if ours and peer else "-"
        goal, paper = GOALS.get(shape[1]), PAPER.get(shape[1])
        table.add_row(
            f"{shape[0]} x {8 * shape[1]}",
            *(f"{row['images_per_s']:.3f}" if row else "-" for row in (ours, peer)),
            ratio,
            *(f"{value:.2f}x" if value else "-" for value in (goal, paper)),
            f"{ours['decode_s'] / (ours['denoise_s'] + ours['decode_s']):.1%}" if ours else "-",
        )
    return table


def _measure(
    config: ImagesConfig, shape: Shape, decoder: Autoencoder, device: torch.device
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    loops: dict[str, _Loop] = {}
    for provider in ("lamamba", "dit"):
        peer_on_cuda = provider == "dit" and device.type == "cuda"
        level = config.level or ("compile" if peer_on_cuda else "eager")
        form = config.scan_backend if provider == "lamamba" else "one-embedding"
        rows[provider] = {
            "provider": provider if provider == "lamamba" else peer_name(config.preset),
            "preset": config.preset,
            "variant": f"{form}/{level}" + ("+graph" if device.type == "cuda" else ""),
            "scope": "images",
            "numerics": config.numerics,
            "images": shape.rows,
            "rows": 2 * shape.rows,
            "side": shape.side,
            "resolution": shape.side * decoder.downsampling,
            "sampler": config.sampler,
            "steps": config.steps,
        }
        try:
            loops[provider] = _loop(config, provider, level, shape, device)
            loops[provider].run()
            _pixels(loops[provider], decoder)
        except Exception as error:  # out of memory, or whatever a kernel or a compiler fails with
            rows[provider]["skipped"] = one_line(error)
            loops.pop(provider, None)
            release(device)
    seconds: dict[str, list[tuple[float, float]]] = {provider: [] for provider in loops}
    for _ in range(config.repeats):
        for provider, loop in loops.items():
            seconds[provider].append(_timed(loop, decoder, device))
    for provider, samples in seconds.items():
        denoise, decode = (statistics.median(part) for part in zip(*samples, strict=True))
        rows[provider] |= {
            "denoise_s": round(denoise, 4),
            "decode_s": round(decode, 4),
            "step_ms": round(1e3 * denoise / config.steps, 4),
            "images_per_s": round(shape.rows / (denoise + decode), 4),
            "slowest_images_per_s": round(shape.rows / max(map(sum, samples)), 4),
            "repeats": len(samples),
            "finite": bool(loops[provider].latents.isfinite().all()),
        }
    return list(rows.values())


def _loop(config: ImagesConfig, provider: str, level: str, shape: Shape, device: torch.device) -> _Loop:
    dtype = DTYPES[config.numerics]
    network: Any
    if provider == "lamamba":
        network = build_lamamba(config.preset, shape.side, d_state=1, device=device, dtype=dtype)
        network.use_scan_backend(resolve_scan_backend(config.scan_backend, device))
        num_classes = network.architecture.num_classes
    else:
        network = EmbeddedOnce(build_dit(config.preset, shape.side, device=device, dtype=dtype))
        num_classes = dit_architecture(config.preset, shape.side).num_classes
    optimize(network, level)
    return _Loop(
        network,
        sampler_table(config.sampler, config.steps, NoiseSchedule.linear()),
        shape,
        num_classes=num_classes,
        guidance_scale=config.guidance_scale,
        device=device,
    )


def build_vae(preset: str, device: torch.device) -> AutoencoderKL:
    """An autoencoder of sd-vae-ft-mse's configuration (a small one for `tiny`) with random weights, fp32."""
    torch.manual_seed(0)
    module = AutoencoderKL(
        **(_TINY_VAE if preset == "tiny" else _VAE),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    moved: AutoencoderKL = nn.Module.to(module, device=device)
    return moved


def _decoder(config: ImagesConfig, device: torch.device) -> Autoencoder:
    module = build_vae(config.preset, device)
    nn.Module.to(module, dtype=DTYPES[config.numerics])
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]  # for 4 axes alone
    return Autoencoder(module, micro_batch_pixels=_MICRO_BATCH_PIXELS)


def _pixels(loop: _Loop, decoder: Autoencoder) -> Tensor:
    return decoder.pixels(loop.latents).cpu()


def _timed(loop: _Loop, decoder: Autoencoder, device: torch.device) -> tuple[float, float]:
    """Seconds of all steps, and of decoding until the pixels are in the host's memory."""
    started = time.perf_counter()
    loop.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    denoised = time.perf_counter()
    _pixels(loop, decoder)
    return denoised - started, time.perf_counter() - denoised
