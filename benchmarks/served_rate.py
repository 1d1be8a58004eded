"""What does a server make of what its sampler can, and what does diffusers' own pipeline make of DiT?

Images a second of one model, one step count, guided, from class numbers to pixels in the host's memory:

    sampler    `LaMambaPipeline.generate` in this process, whole batches, one after the other
    served     `lamamba serve` saturated by requests for one image each: HTTP, queue, batching and PNG besides
    dit        diffusers' `DiTPipeline` around DiT-XL/2 with random weights, as large a batch (`--dit`, CUDA)

The server's overhead is what it lacks of the sampler's rate. Sampler and server take turns, each alone on the
machine. A minute on two cores; with a preset on a GPU:

    lamamba bench random-model xl-256
    python benchmarks/served_rate.py --model xl-256 --images 64 --steps 50 --dit --name served-rate-h100
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import RESULTS, device_slug, write_results
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.device import resolve_device
from model.diffusion.samplers import SAMPLERS
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from service.benchmark.mix import MixEntry
from service.benchmark.run import LoadConfig, measure_saturated
from service.benchmark.server import running_command, serve_command
from service.benchmark.summary import REQUESTS_PER_CONCURRENCY

GUIDANCE_SCALE = 2.5


def batch_rate(make: Callable[[], object], num_images: int) -> float:
    """Images a second of one batch."""
    start = time.perf_counter()
    make()
    return num_images / (time.perf_counter() - start)


def sampler(arguments: argparse.Namespace, device: torch.device) -> tuple[LaMambaPipeline, Callable[[], Any]]:
    """The pipeline as the server loads it, and what makes a batch with it, run once."""
    pipeline = LaMambaPipeline.load(arguments.model, device=device, num_row_threads=available_cpu_threads())
    for _ in pipeline.prepare_steps(max_images=arguments.images):
        pass

    def make() -> torch.Tensor:
        return pipeline.generate(
            [0] * arguments.images,
            seeds=range(arguments.images),
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=arguments.steps,
            sampler=arguments.sampler,
            batch_size=arguments.images,
        ).cpu()

    make()
    return pipeline, make


def served(arguments: argparse.Namespace, resolution: int, device: torch.device) -> dict[str, Any]:
    """Figures of a server that always has more to do than it has slots."""
    entry = MixEntry(
        steps=arguments.steps, resolution=resolution, sampler=arguments.sampler, cfg_scale=GUIDANCE_SCALE
    )
    concurrency = 2 * arguments.images  # the next images wait while the last ones are decoded and encoded
    config = LoadConfig(mix=(entry,), requests=REQUESTS_PER_CONCURRENCY * concurrency, max_seconds=3600.0)
    options = ["--models", str(arguments.model.resolve()), "--device", device.type]
    options += ["--max-rows", str(2 * arguments.images)]
    with running_command(serve_command(options)) as server:
        figures, _ = measure_saturated(server.url, config, concurrency, lambda outcome: None)
        return figures | {"ready_s": round(server.ready_s, 2)} | server.memory_bytes()


def dit(arguments: argparse.Namespace, side: int, device: torch.device) -> Callable[[], object]:
    """What makes a batch with diffusers' pipeline in bf16, run once."""
    from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler

    from model.benchmark.networks import build_dit
    from model.benchmark.sampling import build_vae

    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
    vae = torch.nn.Module.to(build_vae("XL", device), dtype=torch.bfloat16)
    pipeline = DiTPipeline(
        transformer=build_dit("XL", side, device=device, dtype=torch.bfloat16),
        vae=vae,
        scheduler=scheduler[arguments.sampler](),
    )
    pipeline.set_progress_bar_config(disable=True)

    def make() -> object:
        return pipeline(
            class_labels=[0] * arguments.images,
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=arguments.steps,
            output_type="np",
        ).images

    make()
    return make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=default_model_dir(128), help="a model folder")
    parser.add_argument("--device", help="cuda or cpu; by default CUDA if there")
    parser.add_argument("--images", type=int, default=8, help="images of a batch (default: 8)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm++")
    parser.add_argument("--repeats", type=int, default=3, help="turns of sampler and server (default: 3)")
    parser.add_argument("--dit", action="store_true", help="DiT-XL/2 too, by diffusers' pipeline")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the results file; by default served-rate- and the device")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    if arguments.dit and device.type != "cuda":
        parser.error("--dit: DiT-XL/2 is measured on CUDA alone")

    prepare_process()
    pipeline, make = sampler(arguments, device)
    rates: dict[str, list[float]] = {"sampler": [], "served": []}
    servers = []
    for turn in range(arguments.repeats):
        rates["sampler"].append(batch_rate(make, arguments.images))
        servers.append(served(arguments, pipeline.resolution, device))
        rates["served"].append(servers[-1]["saturated_images_per_s"])
        print(turn, {name: round(own[-1], 3) for name, own in rates.items()}, flush=True)
    if arguments.dit:
        make_dit = dit(arguments, pipeline.latent_shape[-1], device)
        rates["dit"] = [batch_rate(make_dit, arguments.images) for _ in range(arguments.repeats)]
    medians = {name: statistics.median(own) for name, own in rates.items()}
    results = {
        "model": pipeline.name,
        "resolution": pipeline.resolution,
        "images": arguments.images,
        "steps": arguments.steps,
        "sampler": arguments.sampler,
        "guidance_scale": GUIDANCE_SCALE,
        "images_per_s": {name: [round(rate, 4) for rate in own] for name, own in rates.items()},
        "median_images_per_s": {name: round(rate, 4) for name, rate in medians.items()},
        "overhead": round(1 - medians["served"] / medians["sampler"], 4),
        "servers": servers,
    }
    print({name: results[name] for name in ("median_images_per_s", "overhead")})
    print(
        write_results(arguments.name or f"served-rate-{device_slug(device)}", results, arguments.output_dir)
    )


if __name__ == "__main__":
    main()
