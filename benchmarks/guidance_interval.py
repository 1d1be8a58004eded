"""How much time does a guidance interval save?

4 images of `places-128` on the CPU, DPM-Solver++ with 20 steps, guided at all steps, within intervals, and
not at all: network rows, and seconds from noise to latents, the settings in turn so that a loaded machine
slows all of them alike. Two minutes on two cores.

    python benchmarks/guidance_interval.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import write_results
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.diffusion.guidance import guided_steps
from model.diffusion.samplers import sampler_table
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir

STEPS, SAMPLER, SCALE = 20, "dpm++", 2.5
IMAGES = 4
ROUNDS = 7
INTERVALS = ((0, 999), (0, 800), (100, 800), (200, 700), (300, 600))


def main() -> None:
    """Print a line for each setting and write the results."""
    prepare_process()
    pipeline = LaMambaPipeline.load(
        default_model_dir(128), device="cpu", num_row_threads=available_cpu_threads()
    )
    timesteps = sampler_table(SAMPLER, STEPS, pipeline.schedule).timesteps.tolist()
    settings = [(SCALE, interval) for interval in INTERVALS] + [(1.0, None)]
    seconds: dict[Any, list[float]] = {setting: [] for setting in settings}
    for round_index in range(ROUNDS + 1):
        for scale, interval in settings:
            start = time.perf_counter()
            pipeline.sample_latents(
                range(IMAGES),
                seeds=[0] * IMAGES,
                guidance_scale=scale,
                guidance_interval=interval,
                num_inference_steps=STEPS,
                sampler=SAMPLER,
            )
            if round_index:  # the first one warms up
                seconds[scale, interval].append(time.perf_counter() - start)
    everywhere_s = statistics.median(seconds[settings[0]])
    rows = []
    for scale, interval in settings:
        guided = len(guided_steps(timesteps, scale, interval))
        median_s = statistics.median(seconds[scale, interval])
        rows.append(
            {
                "cfg_scale": scale,
                "guidance_interval": interval,
                "guided_steps": guided,
                "rows_per_image": STEPS + guided,
                "seconds_per_image": round(median_s / IMAGES, 4),
                "share_of_time": round(median_s / everywhere_s, 3),
            }
        )
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ")
    print(write_results("guidance-interval-cpu", rows))


if __name__ == "__main__":
    main()
