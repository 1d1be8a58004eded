"""Are the images that the server makes on a GPU the same to the eye as those of the plain fp32 network?

Each shipped model makes the images of fixed seeds, all its classes in turn, twice by the package's own
pipeline: as the reference, in fp32 by torch's operations alone (scan backend `vectorized`, no TF32), and as
served, in the model's own dtype by the kernels, each denoising step one CUDA graph. Their 8-bit images are
compared:

    served     each by its own autoencoder, as a user would see them
    network    the latents of both by the fp32 autoencoder: what the network's precision alone does
    decoder    the reference's latents by the served and by the fp32 autoencoder: what the decoder's does

Beside them, the relative RMS of the final latents and of one forward. XL has no trained weights here: random
ones, modulations included, and one forward. Its bf16 weights are compared with the fp32 ones that they were
rounded from and, as `same_weights`, with themselves in fp32 arithmetic. A picture for each model and guidance
shows the four images that differ most: reference, served, and their difference, amplified.

`--dtype` serves them in another. On a CPU, a dry run, `served` is bf16 by torch's operations. A few steps say
nothing about 20: the first one, almost all noise, divides the error of eps by an alpha of about 0.006, and
only the next ones correct that.

    python benchmarks/image_agreement.py
    python benchmarks/image_agreement.py --device cpu --preset tiny --images 1 --steps 1 --output-dir outputs
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.autoencoder import Autoencoder
from model.benchmark.config import PRESETS, architecture
from model.benchmark.environment import RESULTS, write_results
from model.benchmark.forward import relative_rms
from model.benchmark.networks import build_lamamba
from model.benchmark.timing import release
from model.device import make_current, resolve_device
from model.images import encode_image, image_grid
from model.limits import DEFAULT_STEPS
from model.model_folder import GPU_DTYPES
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend
from model.pipeline import LaMambaPipeline
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir

SAMPLER = "dpm++"
LEAST_PSNR_DB = 40.0
MOST_FORWARD_RMS = 1e-2
EQUAL_DB = 100.0
"""The PSNR of equal images; one value off by one among those of 128 px gives 95 dB."""
FORWARD_ROWS, FORWARD_SIDE = 4, 32
SHOWN_IMAGES, AMPLIFICATION = 4, 16


class RecordingAutoencoder:
    """In a pipeline's place of its autoencoder: decodes as that does and keeps the latents."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.latents: list[Tensor] = []

    def pixels(self, latents: Tensor) -> Tensor:
        self.latents.append(latents)
        return self.autoencoder.pixels(latents)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolutions", type=int, nargs="+", default=list(PRETRAINED_RESOLUTIONS))
    parser.add_argument("--images", type=int, default=64, help="seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS[SAMPLER])
    parser.add_argument(
        "--guidance-scales",
        type=float,
        nargs="+",
        default=[1.5],
        help="the model's own comes last in any case",
    )
    parser.add_argument("--preset", default="XL", choices=PRESETS, help="of the forward with random weights")
    parser.add_argument("--dtype", choices=GPU_DTYPES, help="of what is served; default: the model's own")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    device = resolve_device(arguments.device)
    make_current(device)
    # The reference's; of what is served, nothing is an fp32 product or convolution of torch's.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    named = arguments.dtype or (None if device.type == "cuda" else "bfloat16")
    served_dtype = named and getattr(torch, named)
    rows = []
    for resolution in arguments.resolutions:
        folder = default_model_dir(resolution)
        reference = LaMambaPipeline.load(
            folder, device=device, dtype=torch.float32, scan_backend="vectorized", cuda_graphs=False
        )
        served = LaMambaPipeline.load(folder, device=device, dtype=served_dtype)
        for scale in dict.fromkeys([*arguments.guidance_scales, served.default_guidance_scale]):
            row, picture = compare_images(
                reference, served, guidance_scale=scale, num_images=arguments.images, steps=arguments.steps
            )
            name = f"image-agreement-{resolution}-cfg{scale:g}.png"
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            (arguments.output_dir / name).write_bytes(picture)
            rows.append(row | {"picture": name})
            print_images(row)
        del reference, served
        release(device)
    forward = compare_forward(arguments.preset, device)
    print(
        f"{arguments.preset} forward, {forward['scan_backend']} {forward['dtype']}: relative RMS "
        f"{forward['relative_rms']:.2e}, of the same weights {forward['same_weights']:.2e}"
    )
    results: dict[str, Any] = {"images": rows, "forward": forward, "goals": against_goals(rows, forward)}
    for name, goal in results["goals"].items():
        print(f"{'met' if goal['met'] else 'MISSED':6} {name} {goal['goal']}: {goal['measured']:g}")
    print(write_results("image-agreement", results, arguments.output_dir))


@torch.inference_mode()
def compare_images(
    reference: LaMambaPipeline, served: LaMambaPipeline, *, guidance_scale: float, num_images: int, steps: int
) -> tuple[dict[str, Any], bytes]:
    """The figures of one model at one guidance scale, and the picture of the images that differ most."""
    started = time.perf_counter()
    expected, expected_latents = generated(reference, guidance_scale, num_images, steps)
    pixels, latents = generated(served, guidance_scale, num_images, steps)
    pairs = {
        "served": (expected, pixels),
        "network": (expected, decoded(reference, latents)),
        "decoder": (expected, decoded(served, expected_latents)),
    }
    decibels = {name: psnr(*pair) for name, pair in pairs.items()}
    row = {
        "model": reference.name,
        "resolution": reference.resolution,
        "guidance_scale": guidance_scale,
        "sampler": SAMPLER,
        "steps": steps,
        "images": num_images,
        "reference": described(reference),
        "served": described(served),
        "psnr_db": {name: summary(values) for name, values in decibels.items()},
        "largest_difference": {name: largest_difference(*pair) for name, pair in pairs.items()},
        "latents_relative_rms": relative_rms(latents, expected_latents),
        "forward_relative_rms": forward_rms(reference, served),
        "seconds": round(time.perf_counter() - started, 1),
    }
    worst = torch.tensor(decibels["served"]).argsort()[:SHOWN_IMAGES]
    description = {
        "Description": f"{reference.name}, cfg {guidance_scale:g}: fp32 reference, served, "
        f"{AMPLIFICATION} x difference, of seeds {worst.tolist()}"
    }
    return row, encode_image(strip(expected[worst], pixels[worst]), "png", 100, description)


def generated(
    pipeline: LaMambaPipeline, guidance_scale: float, num_images: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Pixels (n, H, W, 3) uint8 on the CPU, and the latents that they were decoded from."""
    recording = RecordingAutoencoder(pipeline.autoencoder)
    pixels = dataclasses.replace(pipeline, autoencoder=cast(Autoencoder, recording)).generate(
        [seed % pipeline.num_classes for seed in range(num_images)],
        seeds=range(num_images),
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        sampler=SAMPLER,
    )
    return pixels, torch.cat(recording.latents)


def decoded(pipeline: LaMambaPipeline, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Pixels as `generate` makes them of latents, whoever's these are."""
    return torch.cat([pipeline.decode(part) for part in latents.split(batch_size)])


def psnr(expected: Tensor, pixels: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each 8-bit image in dB; `EQUAL_DB` for equal ones."""
    error = (pixels.double() - expected.double()).square().flatten(1).mean(1)  # (n,)
    return [min(EQUAL_DB, value) for value in (10 * torch.log10(255**2 / error)).tolist()]


def summary(decibels: list[float]) -> dict[str, float]:
    values = {
        "min": min(decibels),
        "median": statistics.median(decibels),
        "mean": statistics.fmean(decibels),
    }
    return {name: round(value, 2) for name, value in values.items()}


def largest_difference(expected: Tensor, pixels: Tensor) -> int:
    return int((pixels.int() - expected.int()).abs().max())


def forward_rms(reference: LaMambaPipeline, served: LaMambaPipeline) -> float:
    """Of one forward of noise at random timesteps."""
    inputs = forward_inputs(reference.latent_shape, reference.num_classes, reference.device)
    return relative_rms(sample(served.network, *inputs), sample(reference.network, *inputs))


@torch.inference_mode()
def compare_forward(preset: str, device: torch.device) -> dict[str, Any]:
    """Random weights: bf16 on the device's fastest backend against fp32 by torch's operations."""
    sizes = architecture(preset, FORWARD_SIDE)
    inputs = forward_inputs((sizes.in_channels, FORWARD_SIDE, FORWARD_SIDE), sizes.num_classes, device)

    def network(dtype: torch.dtype, backend: str) -> LaMambaDiff:
        built = build_lamamba(preset, FORWARD_SIDE, d_state=sizes.d_state, device=device, dtype=dtype)
        built.use_scan_backend(resolve_scan_backend(backend, device))
        return built

    reference = network(torch.float32, "vectorized")
    expected = sample(reference, *inputs)
    fast = network(torch.bfloat16, "auto")
    output = sample(fast, *inputs)
    reference.load_state_dict(fast.state_dict())  # rounded, into the tensors that the network has
    return {
        "preset": preset,
        "rows": FORWARD_ROWS,
        "side": FORWARD_SIDE,
        "scan_backend": fast.scan_backend,
        "dtype": str(fast.dtype).removeprefix("torch."),
        "relative_rms": relative_rms(output, expected),
        "same_weights": relative_rms(output, sample(reference, *inputs)),
    }


def forward_inputs(
    latent_shape: tuple[int, int, int], num_classes: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, C, H, W) as bf16 holds it, t and y (rows,); the same on any device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(FORWARD_ROWS, *latent_shape, generator=generator).bfloat16()
    t = torch.randint(1000, (FORWARD_ROWS,), generator=generator)
    y = torch.randint(num_classes, (FORWARD_ROWS,), generator=generator)
    return x.to(device), t.to(device), y.to(device)


def sample(network: LaMambaDiff, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    output: Tensor = cast(nn.Module, network)(x.to(network.dtype), timestep=t, class_labels=y).sample
    return output


def strip(expected: Tensor, pixels: Tensor) -> Any:
    """Three rows of images (H, W, 3) uint8: reference, served, amplified difference."""
    difference = (pixels.int() - expected.int()).abs() * AMPLIFICATION
    images = torch.cat([expected, pixels, difference.clamp(max=255).to(torch.uint8)])
    return image_grid(list(images.numpy()), columns=len(expected))


def described(pipeline: LaMambaPipeline) -> dict[str, Any]:
    return {
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "scan_backend": pipeline.scan_backend,
        "step": "plain" if pipeline.step_function is None else type(pipeline.step_function).__name__,
    }


def against_goals(rows: list[dict[str, Any]], forward: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal beside what was measured, the worst image of all for each part."""
    goals: dict[str, dict[str, Any]] = {}
    for part in ("served", "network"):
        least = min(row["psnr_db"][part]["min"] for row in rows)
        met = least >= LEAST_PSNR_DB
        goals[f"least_psnr_{part}_db"] = {"goal": f">= {LEAST_PSNR_DB:g}", "measured": least, "met": met}
    measured = forward["relative_rms"]
    goals[f"{forward['preset'].lower()}_forward_relative_rms"] = {
        "goal": f"< {MOST_FORWARD_RMS:g}",
        "measured": measured,
        "met": measured < MOST_FORWARD_RMS,
    }
    return goals


def print_images(row: dict[str, Any]) -> None:
    parts = ", ".join(
        f"{name} {values['min']:.1f} / {values['median']:.1f}" for name, values in row["psnr_db"].items()
    )
    print(
        f"{row['model']} cfg {row['guidance_scale']:g}: PSNR in dB, least / median: {parts}; relative RMS of "
        f"latents {row['latents_relative_rms']:.1e}, of a forward {row['forward_relative_rms']:.1e} "
        f"({row['seconds']:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
