"""How fast is the way from image files to latents on a host's cores, and what does it round?

Three parts, two minutes on two idle cores:
    decoding  ADM's crop to 256 px of a 500 x 375 JPEG, by one thread and by as many as there are cores
    reading   batches of 256 from a cache of random moments at 256 px, in the trainer's order, by the thread
              that reads ahead: from the disk, then from the page cache; and the memory that the process gains
    rounding  of the shipped autoencoder's latents of views of places, by encoding in bfloat16 and by keeping
              the moments in fp16: root mean squares, beside the latents' and the posterior's own spread

CPU time stands beside the wall time, for hosts that have other work.

    python benchmarks/latents.py --cache-gb 2
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fake_imagenet import jpeg
from model import default_model_dir
from model.autoencoder import Autoencoder, to_pixels
from model.benchmark.environment import RESULTS, write_results
from model.cpu_threads import available_cpu_threads
from model.data.center_crop import decode_image
from model.data.latent_shards import LatentShards
from model.data.places import Places
from model.data.prefetch import Prefetcher
from model.data.shard_records import write_index, write_shard

SHAPE = (500, 375)
RESOLUTION = 256
MOMENTS_SHAPE = (8, 32, 32)
SHARD_IMAGES = 8192
BATCH_SIZE = 256
_IMAGE_BYTES = 2 * 2 * 8 * 32 * 32  # both flips


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache-gb", type=float, default=2.0, help="size of the cache that is read")
    parser.add_argument("--batches", type=int, default=200, help="read for each figure")
    parser.add_argument("--images", type=int, default=200, help="decoded for each figure")
    parser.add_argument("--views", type=int, default=16, help="encoded for the roundings")
    parser.add_argument("--folder", type=Path, help="where the cache is written for a while")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"decoding": decoding(options.images)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results["reading"] = reading(Path(folder), options.cache_gb, options.batches)
    results["rounding"] = rounding(options.views)
    for part, figures in results.items():
        print(part, *(f"{name}: {value}" for name, value in figures.items()), sep="\n    ")
    print(write_results("latents-cpu", results, options.output_dir))


def decoding(num_images: int) -> dict[str, Any]:
    """By one thread and by all cores."""
    view = to_pixels(Places.load().render(torch.arange(1), max(SHAPE))[0])[0].numpy()
    content = jpeg(view, SHAPE)
    figures: dict[str, Any] = {"jpeg_bytes": len(content)}
    for count in sorted({1, available_cpu_threads()}):
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(decode_image, [content] * count, [RESOLUTION] * count))
            timer = _Timer()
            list(pool.map(decode_image, [content] * num_images, [RESOLUTION] * num_images))
            figures[f"threads_{count}"] = timer.figures(num_images)
    return figures


def reading(folder: Path, cache_gb: float, num_batches: int) -> dict[str, Any]:
    """Images a second from the disk and from the page cache."""
    write_random_cache(folder, max(1, round(cache_gb * 1e9 / (SHARD_IMAGES * _IMAGE_BYTES))))
    for path in folder.glob("*.safetensors"):
        _drop_pages(path)
    before = _resident_bytes()
    with LatentShards.open(folder) as shards:
        cold = read_batches(shards, num_batches)
        for path in folder.glob("*.safetensors"):
            path.read_bytes()
        warm = read_batches(shards, num_batches)
        return {
            "cache_images": len(shards),
            "cache_gb": round(len(shards) * _IMAGE_BYTES / 1e9, 2),
            "from_disk": cold,
            "from_page_cache": warm,
            "memory_gained_mb": round((_resident_bytes() - before) / 1e6, 1),
        }


def write_random_cache(folder: Path, num_shards: int) -> None:
    """Shards of one and the same random moments."""
    moments = np.random.default_rng(0).integers(0, 2**14, (SHARD_IMAGES, 2, *MOMENTS_SHAPE), np.int16)
    records = [
        write_shard(
            folder,
            number,
            moments=moments.view(np.float16),
            labels=np.zeros(SHARD_IMAGES, np.int64),
            num_classes=1,
            bad_images=[],
            made_from={"source": "random", "resolution": RESOLUTION, "autoencoder": "none"},
        )
        for number in range(num_shards)
    ]
    write_index(folder, records, labels=["noise"], moments_shape=MOMENTS_SHAPE)


def read_batches(shards: LatentShards, num_batches: int) -> dict[str, float]:
    """By a consumer that only takes the batches."""
    device = torch.device("cpu")
    moments = torch.empty(BATCH_SIZE, *shards.moments_shape, dtype=torch.float16)
    labels = torch.empty(BATCH_SIZE, dtype=torch.int64)
    with Prefetcher(shards, first_sample=0, batch_size=BATCH_SIZE, seed=0, device=device) as batches:
        batches.next_into(moments, labels)
        timer = _Timer()
        for _ in range(num_batches):
            batches.next_into(moments, labels)
        return timer.figures(num_batches * BATCH_SIZE)


def rounding(num_views: int) -> dict[str, float]:
    """Root mean squares, of scaled latents."""
    images, _ = Places.load().render(torch.arange(num_views), 128)
    encoder = Autoencoder.load(default_model_dir(256) / "vae")
    exact = encoder.encode_moments(images)
    nn.Module.to(encoder.module, dtype=torch.bfloat16)  # torch's own: diffusers' warns at every cast
    in_bf16 = Autoencoder(encoder.module).encode_moments(images)
    mean, ones = encoder.latents(exact), torch.ones_like(exact.chunk(2, dim=1)[0])
    spread = encoder.latents(exact, ones) - mean
    return {
        name: round(float(value.square().mean().sqrt()), 6)
        for name, value in (
            ("latents", mean),
            ("posterior", spread),
            ("encoding_in_bfloat16", encoder.latents(in_bf16) - mean),
            ("keeping_fp16", encoder.latents(exact.half()) - mean),
        )
    }


class _Timer:
    """Wall and CPU time of all threads since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def figures(self, num_images: int) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {
            "images_per_second": round(num_images / wall, 1),
            "images_per_cpu_second": round(num_images / cpu, 1),
        }


def _drop_pages(path: Path) -> None:
    """Have the system forget what it holds of a file."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
