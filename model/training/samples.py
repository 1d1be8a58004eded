"""A grid of samples from a run's averaged weights, always of the same seeds and classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.autoencoder import Autoencoder
from model.diffusion.schedule import NoiseSchedule
from model.evaluation.pictures import spread
from model.images import image_grid
from model.model_folder import DEFAULT_GUIDANCE_SCALE, moved_network
from model.network.kinds import DiffusionNetwork
from model.pipeline import LaMambaPipeline

__all__ = ["sample_grid"]

_NUM_IMAGES = 16


def sample_grid(
    network: DiffusionNetwork,
    autoencoder: Autoencoder,
    labels: Sequence[str],
    *,
    device: torch.device,
    gpu_dtype: str,
) -> NDArray[np.uint8]:
    """16 images (H, W, 3) of classes spread over all, as the service makes them; `network` is used up."""
    dtype = getattr(torch, gpu_dtype) if device.type == "cuda" else torch.float32
    pipeline = LaMambaPipeline(
        name="samples",
        resolution=network.architecture.sample_size * autoencoder.downsampling,
        network=moved_network(network, dtype=dtype),
        autoencoder=autoencoder,
        schedule=NoiseSchedule.linear(),
        labels=tuple(labels),
        guidance_channels=None,
        default_guidance_scale=DEFAULT_GUIDANCE_SCALE,
        weights_hash="",
        device=device,
        dtype=dtype,
    )
    classes = spread(len(labels), _NUM_IMAGES) if pipeline.num_classes else [pipeline.null_label]
    wanted = [classes[image % len(classes)] for image in range(_NUM_IMAGES)]
    pixels = pipeline.generate(wanted, seeds=range(_NUM_IMAGES))  # (16, H, W, 3)
    return image_grid(list(pixels.numpy()))
