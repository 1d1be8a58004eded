"""What does a preview cost beside the denoising step that it follows?

Medians of a step and of a preview, guided, for some numbers of images in the batch, each until the device is
done: the work of the engine's thread; encoding runs in other threads. Ten seconds on two cores.

    python benchmarks/previews.py
    python benchmarks/previews.py --model xl-256 --images 1 16 64 --name previews-h100
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import RESULTS, device_slug, write_results
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.device import resolve_device
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from service.engine.request import GenerationRequest, Ticket
from service.engine.runner import Runner

REPEATS = 20


def median_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run, after one that is not counted."""

    def finished() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finished()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        finished()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a line for each number of images, and write them down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=default_model_dir(128), help="a model folder")
    parser.add_argument("--device", help="cuda or cpu; by default CUDA if there")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="in the batch (default: 1 4)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the results file; by default previews- and the device")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    prepare_process()
    pipeline = LaMambaPipeline.load(arguments.model, device=device, num_row_threads=available_cpu_threads())
    rows = []
    for num_images in arguments.images:
        request = GenerationRequest(
            request_id="previews",
            model=pipeline.name,
            class_label=1,
            guidance_scale=2.5,
            num_inference_steps=20,
            sampler="dpm++",
            seed=0,
            num_images=num_images,
        )
        jobs = Ticket(request, submitted_at=0.0).jobs
        for slot, job in enumerate(jobs):
            job.slot = slot
        runner = Runner(pipeline, num_slots=num_images)
        step_s = median_s(partial(runner.step, jobs), device)
        preview_s = median_s(partial(runner.preview, jobs), device)
        rows.append(
            {
                "images": num_images,
                "step_ms": round(1e3 * step_s, 3),
                "preview_ms": round(1e3 * preview_s, 3),
                "share_of_step": round(preview_s / step_s, 5),
            }
        )
        print(rows[-1], flush=True)
    results = {"model": pipeline.name, "resolution": pipeline.resolution, "rows": rows}
    print(write_results(arguments.name or f"previews-{device_slug(device)}", results, arguments.output_dir))


if __name__ == "__main__":
    main()
