"""Where a step's moments and labels come from: views of places on the device, or a streamed latents cache.

What a CUDA graph of the step reads lies in tensors that stay where they are: `prepare` fills them on the host
before the step, `rows` picks from them within it.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.autoencoder import Autoencoder
from model.data.latent_shards import LatentShards
from model.data.latents import LatentCache
from model.data.prefetch import Prefetcher
from model.data.sample_order import shuffled

__all__ = ["CachedSource", "Source", "StreamedSource"]

_PLANNED_STEPS = 64


class Source(Protocol):
    """Moments and labels of this rank's part of each step, on the training device."""

    autoencoder: Autoencoder

    def prepare(self, first_sample: int) -> None:
        """On the host, before the step that begins with sample `first_sample` of the run."""

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """Moments (n, 2C, h, w) fp16 and labels (n,) int64 of those rows of the part."""

    def close(self) -> None:
        """Stop reading."""


class CachedSource:
    """Moments that lie on the device as a whole."""

    def __init__(
        self, cache: LatentCache, *, rows: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """`rows`: samples of a rank's part of a step."""
        self.autoencoder = cache.autoencoder
        self._cache, self._seed = cache, seed
        self._offset, self._batch_size = rank * rows, rows * world_size
        # Positions of so many steps are computed at once, which takes hardly longer than those of one.
        self._planned = torch.empty(0)
        self._first_planned = -1
        self._positions = torch.zeros(rows, dtype=torch.int64, device=cache.labels.device)

    def prepare(self, first_sample: int) -> None:
        step, rest = divmod(first_sample - self._first_planned, self._batch_size)
        if self._first_planned < 0 or rest or not 0 <= step < _PLANNED_STEPS:
            step, self._first_planned = 0, first_sample
            self._planned = self._plan(first_sample).to(self._positions.device)
        self._positions.copy_(self._planned[step])

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        positions = self._positions[part]
        return self._cache.moments[positions], self._cache.labels[positions]

    def close(self) -> None:
        """Nothing is read."""

    def _plan(self, first_sample: int) -> Tensor:
        """Positions (steps, rows) in the cache; a view of places has its flip in itself."""
        steps = first_sample + self._offset + self._batch_size * np.arange(_PLANNED_STEPS)
        samples = steps[:, None] + np.arange(len(self._positions))
        positions, _ = shuffled(samples.ravel(), len(self._cache), self._seed)
        return torch.from_numpy(positions).view(samples.shape)


class StreamedSource:
    """Moments read ahead from shards on a disk."""

    def __init__(
        self,
        shards: LatentShards,
        autoencoder: Autoencoder,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size`: samples of a step, of all ranks together."""
        self.autoencoder = autoencoder
        self._device, self._batch_size = device, batch_size
        self._start = partial(
            Prefetcher,
            shards,
            batch_size=batch_size,
            seed=seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
        self._prefetcher: Prefetcher | None = None
        self._next_sample = 0
        rows = batch_size // world_size
        self._moments = torch.zeros(rows, *shards.moments_shape, dtype=torch.float16, device=device)
        self._labels = torch.zeros(rows, dtype=torch.int64, device=device)

    def prepare(self, first_sample: int) -> None:
        if self._prefetcher is None or first_sample != self._next_sample:
            self.close()
            self._prefetcher = self._start(first_sample=first_sample)
        self._prefetcher.next_into(self._moments, self._labels)
        self._next_sample = first_sample + self._batch_size

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        return self._moments[part], self._labels[part]

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
