"""A small latents cache of random moments, made without images or an autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.data.shard_records import write_index, write_shard

MADE_FROM = {"source": "random", "resolution": 16, "autoencoder": "0" * 64}
LABELS = ("red barn", "blue house", "green hill")


def save_latents(
    folder: Path, sizes: tuple[int, ...] = (5, 1, 4)
) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Write shards of these sizes; returns their moments (n, 2, 8, 4, 4) and labels (n,)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((sum(sizes), 2, 8, 4, 4)).astype(np.float16)
    labels = generator.integers(len(LABELS), size=sum(sizes))
    ends = np.cumsum(sizes)
    records = [
        write_shard(
            folder,
            number,
            moments=moments[end - size : end],
            labels=labels[end - size : end],
            num_classes=len(LABELS),
            bad_images=[],
            made_from=MADE_FROM,
        )
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    write_index(folder, records, labels=LABELS, moments_shape=(8, 4, 4))
    return moments, labels
