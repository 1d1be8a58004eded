"""The latents cache: posterior moments of rendered views, encoded once, kept whole on the training device.

A view costs 2 * 4 * (size / 8)^2 fp16 values: 4 KiB at 128 px, 16 KiB at 256 px, so 200,000 views at 256 px
take 3.3 GB. Every batch samples the posterior afresh. The cache file's name holds a digest of all that it
depends on, so a changed autoencoder or size never meets an old cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.autoencoder import Autoencoder
from model.data.places import Places
from model.messages import one_line
from model.whole_file import whole_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCache:
    """Moments `(n, 2 * C, h, w)` fp16 (mean, then log-variance) and labels `(n,)` int64, on one device."""

    moments: Tensor
    labels: Tensor
    autoencoder: Autoencoder

    def __len__(self) -> int:
        return len(self.labels)


def places_latents(
    places: Places,
    autoencoder: Autoencoder,
    *,
    size: int,
    num_views: int,
    folder: Path,
    first_view_id: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> LatentCache:
    """Latents of the views `first_view_id ..` at `size` pixels, read from `folder` or encoded and written
    there.
    """
    key = json.dumps(
        {
            "autoencoder": autoencoder.weights_hash,
            "first_view_id": first_view_id,
            "num_views": num_views,
            "panoramas": places.digest,
            "size": size,
        },
        sort_keys=True,
    )
    path = folder / f"places-{size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    device = places.device
    if path.is_file():
        logger.info("latents: reading %s", path)
        try:
            tensors = load_file(path, device=str(device))
        except SafetensorError as error:
            raise ValueError(
                f"latents: {path} is damaged ({one_line(error)}); without it the views are encoded again"
            ) from error
        return LatentCache(tensors["moments"], tensors["labels"], autoencoder)

    moments, labels = [], []
    task = (
        progress.add_task(f"encoding {num_views} views at {size} px", total=num_views) if progress else None
    )
    for start in range(0, num_views, batch_size):
        ids = torch.arange(start, min(start + batch_size, num_views), device=device) + first_view_id
        images, classes = places.render(ids, size)
        moments.append(autoencoder.encode_moments(images).half())
        labels.append(classes)
        if progress and task is not None:
            progress.update(task, advance=len(ids))
    tensors = {"moments": torch.cat(moments).contiguous(), "labels": torch.cat(labels)}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"key": key})
    return LatentCache(tensors["moments"], tensors["labels"], autoencoder)
