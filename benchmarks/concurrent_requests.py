"""Does a server under 200 concurrent mixed requests answer each with its own images, and how fast?

A real `lamamba serve` on the CPU, all requests sent at once: both resolutions, all classes, guidance 1 to 4,
2 to 8 steps, all samplers, one or two images, as PNG bytes or as JSON. Then every image is made again alone,
in this process (`LaMambaPipeline.generate`, fp32, a batch of one), and compared: at most 1 of 255 may differ
in any channel of any pixel, and what the file's metadata says must be what was asked for. Exit code 1 where
anything differs. About two minutes on two cores.

    python benchmarks/concurrent_requests.py
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import RESULTS, write_results
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.diffusion.samplers import SAMPLERS
from model.images import read_metadata
from model.pipeline import LaMambaPipeline
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir
from service.benchmark.server import RunningServer, running_server

MAX_DIFFERENCE = 1  # of 255
GUIDANCE_SCALES = (1.0, 1.5, 2.5, 4.0)
TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one request got."""

    status: int
    latency_s: float
    files: tuple[bytes, ...] = field(repr=False)
    """The images as PNG, in order."""


def mixed_requests(count: int, resolutions: Sequence[int], num_classes: int) -> list[dict[str, Any]]:
    """`count` bodies for /generate, the same at every run. Every fourth asks for two images, so that 200
    stay within the server's default queue of 256 images.
    """
    draw = random.Random(0)
    return [
        {
            "resolution": resolutions[index % len(resolutions)],
            "class_id": draw.randrange(num_classes),
            "cfg_scale": draw.choice(GUIDANCE_SCALES),
            "steps": draw.randint(2, 8),
            "sampler": draw.choice(SAMPLERS),
            "num_images": 2 if index % 4 == 3 else 1,
            "seed": draw.randrange(2**32),
        }
        for index in range(count)
    ]


async def send_all(server: RunningServer, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Send all requests at once. Every second one of those for one image wants bytes, the others JSON."""
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:

        async def send(index: int, body: Mapping[str, Any]) -> Answer:
            as_bytes = body["num_images"] == 1 and index % 4 != 1
            headers = {"accept": "image/png" if as_bytes else "application/json"}
            start = time.perf_counter()
            response = await client.post(f"{server.url}/generate", json=dict(body), headers=headers)
            latency_s = time.perf_counter() - start
            files: tuple[bytes, ...] = ()
            if response.status_code == 200 and as_bytes:
                files = (response.content,)
            elif response.status_code == 200:
                files = tuple(base64.b64decode(image["b64_json"]) for image in response.json()["images"])
            return Answer(status=response.status_code, latency_s=latency_s, files=files)

        return await asyncio.gather(*(send(index, body) for index, body in enumerate(bodies)))


def alone(pipeline: LaMambaPipeline, body: Mapping[str, Any], image_index: int) -> NDArray[np.uint8]:
    """The image of the request's seed, (H, W, 3), made in a batch of one."""
    return pipeline.generate(
        [body["class_id"]],
        seeds=[body["seed"]],
        image_indices=[image_index],
        guidance_scale=body["cfg_scale"],
        num_inference_steps=body["steps"],
        sampler=body["sampler"],
    )[0].numpy()


def expected_metadata(pipeline: LaMambaPipeline, body: Mapping[str, Any], image_index: int) -> dict[str, str]:
    return {
        "seed": str(body["seed"]),
        "image_index": str(image_index),
        "class": pipeline.labels[body["class_id"]],
        "cfg": f"{body['cfg_scale']:g}",
        "steps": str(body["steps"]),
        "sampler": body["sampler"],
        "model": pipeline.name,
        "weights": pipeline.weights_hash,
    }


def compare(
    pipelines: Mapping[int, LaMambaPipeline], bodies: Sequence[Mapping[str, Any]], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Every image of every answer against the one made alone."""
    largest: Counter[int] = Counter()  # images by the largest difference of a channel
    values: Counter[int] = Counter()  # channel values by their difference
    wrong: list[dict[str, Any]] = []
    for body, answer in zip(bodies, answers, strict=True):
        if answer.status != 200 or len(answer.files) != body["num_images"]:
            wrong.append({"request": dict(body), "status": answer.status, "images": len(answer.files)})
            continue
        pipeline = pipelines[body["resolution"]]
        for image_index, file in enumerate(answer.files):
            with Image.open(io.BytesIO(file)) as image:
                served = np.asarray(image)
            difference = np.abs(served.astype(int) - alone(pipeline, body, image_index).astype(int))
            levels, counts = np.unique(difference, return_counts=True)
            largest[int(levels[-1])] += 1
            values.update(dict(zip(levels.tolist(), counts.tolist(), strict=True)))
            metadata = read_metadata(file)
            told = all(
                metadata.get(key) == value
                for key, value in expected_metadata(pipeline, body, image_index).items()
            )
            if levels[-1] > MAX_DIFFERENCE or not told:
                wrong.append(
                    {
                        "request": dict(body),
                        "image_index": image_index,
                        "largest_difference": int(levels[-1]),
                        "metadata_as_asked": told,
                    }
                )
    return {
        "images": largest.total(),
        "largest_difference": max(largest, default=0),
        "images_by_largest_difference": dict(sorted(largest.items())),
        "channel_values_by_difference": dict(sorted(values.items())),
        "wrong": wrong,
    }


def summary(answers: Sequence[Answer], total_s: float) -> dict[str, Any]:
    """Statuses, rate and latencies of one burst."""
    latencies = torch.tensor([answer.latency_s for answer in answers])
    p50, p95 = latencies.quantile(torch.tensor([0.5, 0.95])).tolist()
    images = sum(len(answer.files) for answer in answers)
    return {
        "requests": len(answers),
        "statuses": {str(key): n for key, n in sorted(Counter(answer.status for answer in answers).items())},
        "images": images,
        "total_s": round(total_s, 2),
        "images_per_s": round(images / total_s, 2),
        "latency_p50_s": round(p50, 2),
        "latency_p95_s": round(p95, 2),
        "latency_max_s": round(float(latencies.max()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", help="model folders; default: the shipped ones")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folders = arguments.models or [default_model_dir(resolution) for resolution in PRETRAINED_RESOLUTIONS]

    load = os.getloadavg()[0]
    prepare_process()  # as `lamamba` does
    loaded = [LaMambaPipeline.load(folder, device="cpu", dtype=torch.float32) for folder in folders]
    pipelines = {pipeline.resolution: pipeline for pipeline in loaded}
    num_classes = min(pipeline.num_classes for pipeline in loaded)
    bodies = mixed_requests(arguments.requests, sorted(pipelines), num_classes)

    with running_server(folders, environment={"LAMAMBA_DEVICE": "cpu"}) as server:
        start = time.perf_counter()
        answers = asyncio.run(send_all(server, bodies))
        served = summary(answers, time.perf_counter() - start) | server.memory_bytes()
    print(served, flush=True)
    compared = compare(pipelines, bodies, answers)
    print({name: value for name, value in compared.items() if name != "wrong"})
    results = {
        "row_threads": available_cpu_threads(),
        "load_average_before": round(load, 2),
        "served": served,
        "compared": compared,
    }
    print(write_results("concurrent-cpu", results, arguments.output_dir))
    if compared["wrong"]:
        print(f"{len(compared['wrong'])} wrong, the first: {compared['wrong'][0]}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
