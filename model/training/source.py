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

    def __init__(self, cache: LatentCache, *, rows: int, seed: int, rank: int = 0) -> None:
        """`rows`: samples of a rank's part."""
        self._cache, self._seed, self._offset = cache, seed, rank * rows
        self.autoencoder = cache.autoencoder
        self._positions = torch.zeros(rows, dtype=torch.int64, device=cache.labels.device)

    def prepare(self, first_sample: int) -> None:
        samples = first_sample + self._offset + np.arange(len(self._positions))
        positions, _ = shuffled(samples, len(self._cache), self._seed)  # a view has its flip in itself
        self._positions.copy_(torch.from_numpy(positions), non_blocking=True)

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        positions = self._positions[part]
        return self._cache.moments[positions], self._cache.labels[positions]

    def close(self) -> None:
        """Nothing is read."""


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
        batch = next(self._prefetcher)
        self._moments.copy_(batch.moments)
        self._labels.copy_(batch.labels)
        self._next_sample = first_sample + self._batch_size

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        return self._moments[part], self._labels[part]

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
