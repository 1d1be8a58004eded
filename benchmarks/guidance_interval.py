"""How much time does a guidance interval save, and how far does it move the images?

`places-128` on the CPU, DPM-Solver++, guided at all steps, within intervals, and not at all.

    time      network rows of 4 images, and seconds from noise to latents, the settings in turn so that a
              loaded machine slows all of them alike; two minutes on two cores
    images    an image of each class: PSNR and mean square distance of EfficientNet-Lite2's features to those
              of the same seeds guided at all of 20 steps. Beside the intervals stand fewer steps, guided at
              all of them, which save rows as well. Which images are better is another question, of thousands
              of images (`lamamba evaluate --guidance-interval`); five minutes

    python benchmarks/guidance_interval.py time
    python benchmarks/guidance_interval.py images
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_caching import nearness
from model.benchmark.environment import write_results
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.diffusion.guidance import guided_steps
from model.diffusion.samplers import sampler_table
from model.evaluation.features import EfficientNetLite2
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir

STEPS, SAMPLER, SCALE = 20, "dpm++", 2.5
IMAGES = 4
ROUNDS = 7
FEWER_STEPS = (18, 15, 10)
INTERVALS = ((0, 999), (0, 800), (100, 800), (200, 700), (300, 600))


def main() -> None:
    """Print a line for each setting and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("time", "images"))
    part = parser.parse_args().part
    prepare_process()
    pipeline = LaMambaPipeline.load(
        default_model_dir(128), device="cpu", num_row_threads=available_cpu_threads()
    )
    rows = times(pipeline) if part == "time" else images(pipeline)
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    name = {"time": "guidance-interval-cpu", "images": "guidance-interval-images"}[part]
    print(write_results(name, rows))


def times(pipeline: LaMambaPipeline) -> list[dict[str, Any]]:
    """A row for each interval, and for no guidance: network rows and seconds beside guidance everywhere."""
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
    return rows


def images(pipeline: LaMambaPipeline) -> list[dict[str, Any]]:
    """A row for each interval, no guidance and fewer steps: how near the images are to the first row's."""
    extractor, classes = EfficientNetLite2(), range(pipeline.num_classes)
    settings: list[tuple[float, tuple[int, int] | None, int]] = [
        *((SCALE, interval, STEPS) for interval in INTERVALS),
        (1.0, None, STEPS),
        *((SCALE, None, steps) for steps in FEWER_STEPS),
    ]
    made = []
    for scale, interval, steps in settings:
        pixels = pipeline.generate(
            classes,
            seeds=classes,
            guidance_scale=scale,
            guidance_interval=interval,
            num_inference_steps=steps,
            sampler=SAMPLER,
            batch_size=len(classes),
        )
        made.append((pixels, extractor(pixels).pooled))
    rows = []
    for (scale, interval, steps), ours in zip(settings, made, strict=True):
        timesteps = sampler_table(SAMPLER, steps, pipeline.schedule).timesteps.tolist()
        guided = len(guided_steps(timesteps, scale, interval))
        rows.append(
            {
                "cfg_scale": scale,
                "guidance_interval": interval,
                "steps": steps,
                "guided_steps": guided,
                "rows_per_image": steps + guided,
                **nearness(ours, made[0], len(classes)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
