"""What does a preview cost beside the denoising step that it follows?

Medians of a step and of a preview of `places-128` on the CPU, guided, for 1 and 4 images in the batch: the
work of the engine's thread; encoding runs in other threads. Ten seconds on two cores.

    python benchmarks/previews.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from service.engine.request import GenerationRequest, Ticket
from service.engine.runner import Runner

REPEATS = 20


def median_s(run: Callable[[], object]) -> float:
    """Seconds of a run, after one that is not counted."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a line for each number of images."""
    prepare_process()
    pipeline = LaMambaPipeline.load(
        default_model_dir(128), device="cpu", num_row_threads=available_cpu_threads()
    )
    for num_images in (1, 4):
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
        step_s = median_s(lambda runner=runner, jobs=jobs: runner.step(jobs))
        preview_s = median_s(lambda runner=runner, jobs=jobs: runner.preview(jobs))
        print(
            f"{num_images} images: step {1e3 * step_s:.1f} ms, preview {1e3 * preview_s:.2f} ms, "
            f"{preview_s / step_s:.2%}"
        )


if __name__ == "__main__":
    main()
