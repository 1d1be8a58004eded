"""Where the images of an evaluation come from: real views, their reconstructions, the model's samples.

Each source yields batches of (pixels (n, H, W, 3) uint8, labels (n,) int64). All pass through 8 bits, as
files do, so that no set differs from another by its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.autoencoder import Autoencoder, to_pixels
from model.data.places import RESERVED_VIEW_IDS, Places
from model.pipeline import LaMambaPipeline

__all__ = [
    "Batches",
    "balanced_view_ids",
    "first_kept",
    "reconstructed_views",
    "sampled_images",
    "views",
]

Batches = Iterator[tuple[Tensor, Tensor]]

_BATCH_SIZE = 256
_IDS_PER_LOOK = 4096


def views(places: Places, first_id: int, num: int, size: int) -> Batches:
    """`num` real views from `first_id` on, pixels on the device of `places`."""
    for images, labels in _rendered(places, first_id, num, size):
        yield to_pixels(images), labels


def reconstructed_views(
    places: Places, autoencoder: Autoencoder, first_id: int, num: int, size: int
) -> Batches:
    """The same views after the autoencoder (posterior means, decoded)."""
    for images, labels in _rendered(places, first_id, num, size):
        yield to_pixels(autoencoder.decode(autoencoder.latents(autoencoder.encode_moments(images)))), labels


def sampled_images(
    pipeline: LaMambaPipeline,
    num: int,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    sampler: str,
    seed: int,
    num_rows: int,
    fixed_shapes: bool,
    progress: Callable[[int], None] | None = None,
) -> Batches:
    """Samples of classes 0, 1, .., K - 1, 0, 1, ..: image i has noise (seed, i). Tensors are on the CPU.

    Args:
        num_rows: network rows in a batch, at the most.
        fixed_shapes: fill the last batch up with images that are thrown away, so that a compiled network sees
            one shape alone, with guidance and without.
        progress: called with the number of image steps just finished.
    """
    batch_size = max(1, num_rows // 2 if guidance_scale != 1 else num_rows)
    for start in range(0, num, batch_size):
        wanted = min(batch_size, num - start)
        indices = range(start, start + (batch_size if fixed_shapes else wanted))
        labels = [i % pipeline.num_classes for i in indices]
        pixels = pipeline.generate(
            labels,
            seeds=[seed] * len(indices),
            image_indices=indices,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            sampler=sampler,
            batch_size=batch_size,
            progress=progress,
        )
        yield pixels[:wanted], torch.tensor(labels[:wanted])


def first_kept(batches: Batches, keep: list[Tensor], num: int) -> Batches:
    """The batches unchanged; the pixels of at least the first `num` images also go to `keep`, on the CPU."""
    for pixels, labels in batches:
        if sum(map(len, keep)) < num:
            keep.append(pixels.cpu())
        yield pixels, labels


def balanced_view_ids(places: Places, per_class: int) -> Tensor:
    """Ids of reserved views, (K * per_class,) int64, of classes 0, 1, .., K - 1, 0, 1, .."""
    num_classes = len(places.labels)
    found: list[list[int]] = [[] for _ in range(num_classes)]
    first = RESERVED_VIEW_IDS
    while min(map(len, found)) < per_class:
        ids = torch.arange(first, first + _IDS_PER_LOOK, device=places.device)
        for view_id, label in zip(ids.tolist(), places.views(ids).class_ids.tolist(), strict=True):
            found[label].append(view_id)
        first += _IDS_PER_LOOK
    return torch.tensor([found[label][j] for j in range(per_class) for label in range(num_classes)])


def _rendered(places: Places, first_id: int, num: int, size: int) -> Batches:
    for start in range(first_id, first_id + num, _BATCH_SIZE):
        ids = torch.arange(start, min(start + _BATCH_SIZE, first_id + num), device=places.device)
        yield places.render(ids, size)
