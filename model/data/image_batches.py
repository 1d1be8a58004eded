"""Batches of images to encode: decoded from files by threads that work ahead, or rendered from `places`.

Threads, not processes: Pillow decodes and resizes without Python's lock, nothing is copied between processes,
and no worker outlives a killed program.

Legend: n images of a batch, S side in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.center_crop import BadImageError, decode_image
from model.data.image_sources import ImageSource
from model.data.places import Places
from model.messages import one_line

__all__ = ["DecodedImages", "ImageBatch", "ImageBatches", "PlacesViews"]

_SPANS_AHEAD = 3  # that are being decoded while one is being encoded


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """The readable images of a span of a source."""

    images: Tensor
    """(n, 3, S, S) fp32 in [-1, 1], on the device."""
    labels: NDArray[np.int64]
    """(n,)"""
    bad_images: list[tuple[str, str]]
    """Name and reason of each image of the span that could not be read."""


class ImageBatches(Protocol):
    """Images in a fixed order, by number, at one size."""

    kind: str
    labels: tuple[str, ...]
    digest: str
    resolution: int

    def __len__(self) -> int: ...

    def batches(self, spans: Iterable[range]) -> Iterator[ImageBatch]:
        """A batch for each span of numbers, in order."""
        ...


class DecodedImages:
    """The images of files, cropped as ADM does."""

    def __init__(
        self, source: ImageSource, *, resolution: int, device: torch.device, num_threads: int
    ) -> None:
        """Decode by `num_threads` threads, to `device`."""
        self.kind, self.labels, self.digest = source.kind, source.labels, source.digest
        self.resolution = resolution
        self._source, self._device, self._num_threads = source, device, num_threads

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, spans: Iterable[range]) -> Iterator[ImageBatch]:
        pending: deque[tuple[range, list[Future[NDArray[np.uint8] | str]]]] = deque()
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")
        try:
            for span in spans:
                pending.append((span, [pool.submit(self._decode, index) for index in span]))
                if len(pending) > _SPANS_AHEAD:
                    yield self._batch(*pending.popleft())
            while pending:
                yield self._batch(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, index: int) -> NDArray[np.uint8] | str:
        """Pixels, or why there are none."""
        try:
            return decode_image(self._source.read(index), self.resolution)
        except BadImageError as error:
            return one_line(error)
        except OSError as error:
            return error.strerror or one_line(error)

    def _batch(self, span: range, decoded: list[Future[NDArray[np.uint8] | str]]) -> ImageBatch:
        pixels, good, bad = [], [], []
        for index, future in zip(span, decoded, strict=True):
            result = future.result()
            if isinstance(result, str):
                bad.append((self._source.name(index), result))
            else:
                pixels.append(result)
                good.append(index)
        size = self.resolution
        stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
        images = torch.from_numpy(stacked).to(self._device).movedim(-1, 1).float() / 127.5 - 1
        return ImageBatch(
            images=images.contiguous(), labels=self._source.class_ids[np.array(good, int)], bad_images=bad
        )


class PlacesViews:
    """Views of `places`, from the id `first_view_id` on."""

    def __init__(self, places: Places, *, resolution: int, num_views: int, first_view_id: int = 0) -> None:
        """Render on the device of `places`."""
        if num_views < 1:
            raise ValueError(f"views: {num_views} given; 1 or more is accepted")
        self.kind, self.labels, self.resolution = "places", places.labels, resolution
        self.digest = f"{places.digest}-{first_view_id}"
        self._places, self._num_views, self._first_view_id = places, num_views, first_view_id

    def __len__(self) -> int:
        return self._num_views

    def batches(self, spans: Iterable[range]) -> Iterator[ImageBatch]:
        for span in spans:
            ids = torch.arange(span.start, span.stop, device=self._places.device) + self._first_view_id
            images, labels = self._places.render(ids, self.resolution)
            yield ImageBatch(images=images, labels=labels.cpu().numpy(), bad_images=[])
