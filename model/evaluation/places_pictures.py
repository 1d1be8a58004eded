"""What a model of places is shown by: grids of its samples, and the training views nearest to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.autoencoder import to_pixels
from model.data.places import Places
from model.evaluation.features import FeatureExtractor
from model.evaluation.nearest import nearest_views
from model.evaluation.pictures import class_grid, labelled_grid, save_picture, spread
from model.evaluation.sources import RealViews, balanced_view_ids

__all__ = ["nearest_training_views", "save_pictures"]

_GUIDANCE_CLASSES = 6
_NEAREST_SHOWN = 8


def save_pictures(
    samples: Mapping[float, Tensor], places: Places, folder: Path, *, shown_scale: float, per_class: int
) -> list[str]:
    """Write grid, real and guidance into `folder`; returns their files' names.

    `samples`: the first images at each guidance scale, (n, H, W, 3) uint8 of classes 0, 1, .., K - 1, 0, ..
    """
    labels, size = places.labels, samples[shown_scale].shape[1]
    classes = spread(min(len(labels), *map(len, samples.values())), _GUIDANCE_CLASSES)
    guidance = [[_array(images[c]) for images in samples.values()] for c in classes]
    real = _rendered(places, balanced_view_ids(places, per_class), size)
    pictures = {
        "grid": class_grid(_array(samples[shown_scale]), labels),
        "real": class_grid(_array(real), labels),
        "guidance": labelled_grid(guidance, [labels[c] for c in classes], [f"{s:g}" for s in samples]),
    }
    return [save_picture(image, folder, stem) for stem, image in pictures.items()]


def nearest_training_views(
    samples: Tensor, places: Places, folder: Path, *, extractor: FeatureExtractor, num: int, per_class: int
) -> tuple[dict[str, Any], str]:
    """Search the first `num` training views for the nearest to `samples` and, as a measure of what is usual,
    to unseen real views; returns what a report says of it and the name of the picture written.
    """
    labels, size = places.labels, samples.shape[1]
    real = _rendered(places, balanced_view_ids(places, per_class), size)
    training = RealViews(places=places, first_id=0, num=num, size=size)
    found = nearest_views(
        torch.cat([samples.to(real.device), real]), training.batches(range(num)), extractor=extractor
    )
    shown = spread(min(len(labels), len(samples)), _NEAREST_SHOWN)
    rows = [samples[shown], *(_rendered(places, search.ids[shown], size) for search in found.values())]
    picture = labelled_grid(
        [list(_array(row)) for row in rows],
        ["sample", *(f"nearest by {name}" for name in found)],
        [labels[c] for c in shown],
    )
    summary = {
        "num_training_views": num,
        "num_images": len(samples),
        "extractor": extractor.name,
        "extractor_weights": extractor.weights_hash,
        "samples": {name: search.summary(slice(0, len(samples))) for name, search in found.items()},
        "unseen_real_views": {
            name: search.summary(slice(len(samples), None)) for name, search in found.items()
        },
    }
    return summary, save_picture(picture, folder, "nearest")


def _rendered(places: Places, ids: Tensor, size: int) -> Tensor:
    """Pixels (n, H, W, 3) uint8 of the views with these ids."""
    return to_pixels(places.render(ids, size)[0])


def _array(pixels: Tensor) -> NDArray[np.uint8]:
    return pixels.cpu().numpy()
