"""A model small enough to run in microseconds: the real `LaMambaPipeline` around a fake network and
autoencoder.

The network is an element-wise function of (latents, timestep, class), so an image's pixels show which class,
seed, guidance and steps made it; its hooks let a test act at a step, or make one image's work fail. Since the
pipeline is the product's own, "equal to the pipeline's image" means in a test what it means to a user.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from model.autoencoder import to_pixels
from model.diffusion.schedule import NoiseSchedule
from model.pipeline import LaMambaPipeline
from model.preview import PreviewMap

LABELS = ("forest", "kitchen", "venice square", "bathroom", "garden")
LATENT_SIDE = 4
CHANNELS = 4


class FakeNetwork:
    """eps and variance logits, row by row, from elementary functions."""

    def __init__(self, *, num_classes: int) -> None:
        self.architecture = SimpleNamespace(
            num_classes=num_classes, sample_size=LATENT_SIDE, in_channels=CHANNELS
        )
        self.null_label = num_classes
        self.dtype = torch.float32
        self.scan_backend = "reference"
        self.rows_of_calls: list[int] = []
        self.before_call: Callable[[], None] = lambda: None
        self.failing_label: int | None = None
        self.nan_label: int | None = None
        self.rows_that_fit: int | None = None
        """Of a call; more are out of memory."""

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        self.before_call()
        if self.rows_that_fit is not None and len(hidden_states) > self.rows_that_fit:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(hidden_states)} rows")
        self.rows_of_calls.append(len(hidden_states))
        if self.failing_label is not None and bool((class_labels == self.failing_label).any()):
            raise RuntimeError(f"the device fails on class {self.failing_label}")
        t = timestep.float()[:, None, None, None]
        y = class_labels.float()[:, None, None, None]
        eps = torch.sin(hidden_states * (0.3 + 0.1 * y) + y) + 0.2 * torch.cos(t / 150)  # (rows, C, H, W)
        if self.nan_label is not None:
            eps = torch.where(y == self.nan_label, torch.nan, eps)
        return SimpleNamespace(sample=torch.cat([eps, torch.tanh(hidden_states)], dim=1))


class FakeAutoencoder:
    """Latents to images by repeating each latent pixel."""

    def __init__(self, *, downsampling: int) -> None:
        self.downsampling = downsampling
        self.latent_channels = CHANNELS
        self.batches: list[int] = []
        self.before_decode: Callable[[Tensor], None] = lambda latents: None

    def decode(self, latents: Tensor) -> Tensor:
        self.before_decode(latents)
        self.batches.append(len(latents))
        images = torch.tanh(latents[:, :3])  # (n, 3, h, w)
        return images.repeat_interleave(self.downsampling, 2).repeat_interleave(self.downsampling, 3)

    def pixels(self, latents: Tensor) -> Tensor:
        return to_pixels(self.decode(latents))


def fake_pipeline(
    name: str = "fake-16", *, resolution: int = 16, num_classes: int = len(LABELS)
) -> LaMambaPipeline:
    """A pipeline at `resolution`, a multiple of 4; `num_classes` 0 makes it unconditional."""
    return LaMambaPipeline(
        name=name,
        resolution=resolution,
        network=FakeNetwork(num_classes=num_classes),
        autoencoder=FakeAutoencoder(downsampling=resolution // LATENT_SIDE),
        schedule=NoiseSchedule.linear(),
        labels=LABELS[:num_classes],
        guidance_channels=None,
        default_guidance_scale=2.5,
        weights_hash="0123456789ab",
        device=torch.device("cpu"),
        dtype=torch.float32,
        preview_map=PreviewMap(weight=torch.eye(3, CHANNELS) / 100, bias=torch.zeros(3)),
    )


def row_arguments(rows: int, side: int) -> dict[str, Tensor]:
    """What a network is called with: `rows` latents of `side`, each with its own timestep and class."""
    generator = torch.Generator().manual_seed(rows)
    return {
        "hidden_states": torch.randn(rows, 4, side, side, generator=generator),
        "timestep": torch.arange(rows) * 7,
        "class_labels": torch.arange(rows) % 5,
    }
