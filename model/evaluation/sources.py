"""Where the images of an evaluation come from: real views, their reconstructions, files.

An `ImageSet` yields batches of (pixels (n, H, W, 3) uint8, labels (n,) int64, -1 for no label) of any part of
it, so that processes can share it out. All pass through 8 bits, as files do, so that no set differs from
another by its rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.autoencoder import Autoencoder, to_pixels
from model.cpu_threads import available_cpu_threads
from model.data.center_crop import BadImageError, decode_image
from model.data.places import RESERVED_VIEW_IDS, Places
from model.evaluation.archive import mapped_array
from model.evaluation.features import HASH_DIGITS, file_hash
from model.evaluation.frechet import FeatureStatistics
from model.messages import one_line

__all__ = [
    "Batches",
    "FolderImages",
    "ImageSet",
    "NpzImages",
    "RealViews",
    "ReconstructedViews",
    "balanced_view_ids",
    "first_pixels",
]

Batches = Iterator[tuple[Tensor, Tensor]]

_BATCH_SIZE = 256
_IDS_PER_LOOK = 4096
_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class ImageSet(Protocol):
    """So many images, in a fixed order."""

    @property
    def num(self) -> int: ...

    @property
    def description(self) -> dict[str, Any]:
        """What a report says of the set: its name, hash and number of images."""

    def batches(self, part: range) -> Batches:
        """The images with these numbers."""


@dataclass(frozen=True, kw_only=True)
class RealViews:
    """Real views of places from `first_id` on, pixels on its device."""

    places: Places
    first_id: int
    num: int
    size: int

    @property
    def description(self) -> dict[str, Any]:
        kind = "reserved views" if self.first_id >= RESERVED_VIEW_IDS else "training views"
        return {
            "name": f"places, {kind} from {self.first_id}",
            "hash": self.places.digest[:HASH_DIGITS],
            "num_images": self.num,
        }

    def batches(self, part: range) -> Batches:
        for images, labels in self.rendered(part):
            yield to_pixels(images), labels

    def rendered(self, part: range) -> Batches:
        """The views before they pass through 8 bits: (n, 3, S, S) fp32 in [-1, 1]."""
        for batch in _batches(part):
            ids = torch.arange(batch.start, batch.stop, device=self.places.device) + self.first_id
            yield self.places.render(ids, self.size)


@dataclass(frozen=True, kw_only=True)
class ReconstructedViews:
    """Views after the autoencoder (posterior means, decoded)."""

    views: RealViews
    autoencoder: Autoencoder

    @property
    def num(self) -> int:
        return self.views.num

    @property
    def description(self) -> dict[str, Any]:
        name = f"{self.views.description['name']}, reconstructed"
        return {**self.views.description, "name": name}

    def batches(self, part: range) -> Batches:
        autoencoder = self.autoencoder
        for images, labels in self.views.rendered(part):
            yield autoencoder.pixels(autoencoder.latents(autoencoder.encode_moments(images))), labels


class NpzImages:
    """The images of an .npz as ADM's evaluation reads it: `arr_0` (n, H, W, 3) uint8, labels in `arr_1`.

    ADM's reference files also hold the statistics of Inception's features over a whole training set.
    """

    def __init__(self, path: Path) -> None:
        """ValueError names the file and what it lacks."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; an .npz with images in arr_0 is accepted")
        self.path = path
        try:
            self._pixels = mapped_array(path, "arr_0")
        except KeyError as error:
            raise ValueError(f"{path} has no arr_0; an .npz with images in it is accepted") from error
        shape = self._pixels.shape
        is_square = len(shape) == 4 and shape[3] == 3 and shape[1] == shape[2]
        if self._pixels.dtype != np.uint8 or not is_square or 0 in shape:
            raise ValueError(
                f"{path}: arr_0 is {self._pixels.dtype} {shape}; uint8 (n, size, size, 3) is accepted"
            )
        self._labels = self._optional("arr_1")
        if self._labels is not None and (
            self._labels.shape != shape[:1] or self._labels.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"{path}: arr_1 is {self._labels.dtype} {self._labels.shape} for {shape[0]} images; a "
                "class's number each is accepted"
            )

    @property
    def num(self) -> int:
        return len(self._pixels)

    @property
    def size(self) -> int:
        return self._pixels.shape[1]

    @property
    def description(self) -> dict[str, Any]:
        return {"name": self.path.name, "hash": file_hash(self.path), "num_images": self.num}

    def batches(self, part: range) -> Batches:
        for batch in _batches(part):
            images = slice(batch.start, batch.stop)
            labels = np.full(len(batch), -1) if self._labels is None else self._labels[images]
            yield torch.from_numpy(self._pixels[images].copy()), torch.from_numpy(labels.astype(np.int64))

    def published_statistics(self) -> tuple[FeatureStatistics, FeatureStatistics] | None:
        """Of Inception's pooled and spatial features, if the file has them.

        ValueError where they are no means and covariances.
        """
        pooled, spatial = self._statistics("mu", "sigma"), self._statistics("mu_s", "sigma_s")
        return None if pooled is None or spatial is None else (pooled, spatial)

    def _statistics(self, mean_name: str, covariance_name: str) -> FeatureStatistics | None:
        mean, covariance = self._optional(mean_name), self._optional(covariance_name)
        if mean is None or covariance is None:
            return None
        is_real = mean.dtype.kind == covariance.dtype.kind == "f"
        fits = mean.ndim == 1 and covariance.shape == mean.shape * 2
        if not is_real or not fits or not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise ValueError(
                f"{self.path}: {mean_name} is {mean.dtype} {mean.shape}, {covariance_name} "
                f"{covariance.dtype} {covariance.shape}; finite numbers (d,) and (d, d) are accepted"
            )
        return FeatureStatistics(
            mean=torch.from_numpy(np.array(mean, np.float64)),
            covariance=torch.from_numpy(np.array(covariance, np.float64)),
            count=None,
        )

    def _optional(self, name: str) -> NDArray[Any] | None:
        try:
            return mapped_array(self.path, name)
        except KeyError:
            return None


class FolderImages:
    """The pictures in a folder and below it, in the order of their paths, cut to squares as ADM does."""

    def __init__(self, folder: Path, size: int) -> None:
        """ValueError for a folder without pictures. `size`: pixels a side."""
        self.folder, self.size = folder, size
        self._paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not self._paths:
            accepted = ", ".join(sorted(_SUFFIXES))
            raise ValueError(f"{folder}: no pictures in it; a folder with {accepted} is accepted")

    @property
    def num(self) -> int:
        return len(self._paths)

    @property
    def description(self) -> dict[str, Any]:
        """The hash is of the files' names and sizes."""
        digest = hashlib.sha256()
        for path in self._paths:
            line = f"{path.relative_to(self.folder)} {path.stat().st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))  # names need not be UTF-8
        return {
            "name": self.folder.name,
            "hash": digest.hexdigest()[:HASH_DIGITS],
            "num_images": self.num,
        }

    def batches(self, part: range) -> Batches:
        with ThreadPoolExecutor(available_cpu_threads()) as pool:
            for batch in _batches(part):
                pixels = np.stack(list(pool.map(self._read, self._paths[batch.start : batch.stop])))
                yield torch.from_numpy(pixels), torch.full((len(pixels),), -1)

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            return decode_image(path.read_bytes(), self.size)
        except (OSError, BadImageError) as error:
            raise ValueError(f"{path}: cannot be read as a picture ({one_line(error)})") from error


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


def first_pixels(images: ImageSet, num: int) -> Tensor:
    """Of the first `num` images, or of all where they are fewer: (n, H, W, 3) uint8."""
    return torch.cat([pixels for pixels, _ in images.batches(range(min(num, images.num)))])


def _batches(part: range) -> Iterator[range]:
    for start in range(part.start, part.stop, _BATCH_SIZE):
        yield range(start, min(start + _BATCH_SIZE, part.stop))
