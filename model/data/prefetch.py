"""Batches of latents read ahead of the device by a thread, in the order of the run.

The thread reads into buffers that are made once, in pinned memory where the device is a GPU, and calls
nothing of CUDA: it cannot disturb the capture of a CUDA graph. Whoever takes a batch says into which tensors;
the current stream copies it there, after all that it was given before has read the last batch in them.
A buffer is filled again only when its copy to the device is done.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from model.data.latent_shards import LatentShards
from model.data.sample_order import shuffled

__all__ = ["Prefetcher"]

_UNFINISHED_COPIES = 2
"""That the device may be behind: how many batches the host can launch ahead of it."""


@dataclass(frozen=True, kw_only=True)
class _Buffer:
    """A batch on the host."""

    moments: Tensor
    """(n, 2C, h, w) fp16: what `Autoencoder.latents` draws from."""
    labels: Tensor
    """(n,) int64."""


class Prefetcher:
    """This process's part of each batch of a run, without end; closed, or used as a context, it stops.

    Batch k of the run holds the samples from `first_sample` + k * `batch_size` on, in the order of
    `sample_order.shuffled`; a process gets the `rank`-th of `world_size` equal parts.
    """

    def __init__(
        self,
        shards: LatentShards,
        *,
        first_sample: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 4,
    ) -> None:
        """Start to read; `batch_size` counts all processes, `depth` is how many batches are read ahead.

        Raises ValueError for a batch that does not split into `world_size` equal parts.
        """
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size or depth < 1:
            raise ValueError(
                f"batch_size: {batch_size} given; a multiple of {world_size}, the number of processes, is "
                "accepted"
            )
        self._shards, self._seed, self._device = shards, seed, device
        self._size, self._stride = batch_size // world_size, batch_size
        self._first_read = first_sample + rank * self._size
        self._in_flight: deque[tuple[_Buffer, torch.cuda.Event]] = deque()
        self._empty: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[_Buffer | Exception] = queue.SimpleQueue()
        self._on_cuda = device.type == "cuda"
        for _ in range(depth + (_UNFINISHED_COPIES if self._on_cuda else 0)):
            self._empty.put(self._new_buffer())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_batches, name="latents", daemon=True)
        self._thread.start()

    def next_into(self, moments: Tensor, labels: Tensor) -> None:
        """Copy the next batch to the device, into `moments` (n, 2C, h, w) fp16 and `labels` (n,) int64.

        n is this process's part of a batch. Raises what reading the batch raised.
        """
        if self._closed.is_set():
            raise ValueError("a closed prefetcher has no batches")
        self._recycle()
        buffer = self._filled.get()
        if isinstance(buffer, Exception):
            self._filled.put(buffer)  # whoever asks again is told again
            raise buffer
        moments.copy_(buffer.moments, non_blocking=True)
        labels.copy_(buffer.labels, non_blocking=True)
        if self._on_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
            self._in_flight.append((buffer, copied))
        else:
            self._empty.put(buffer)

    def close(self) -> None:
        """Stop reading, and wait for the thread."""
        self._closed.set()
        self._empty.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_buffer(self) -> _Buffer:
        moments = torch.empty(self._size, *self._shards.moments_shape, dtype=torch.float16)
        labels = torch.empty(self._size, dtype=torch.int64)
        if self._on_cuda:
            moments, labels = moments.pin_memory(), labels.pin_memory()
        return _Buffer(moments=moments, labels=labels)

    def _recycle(self) -> None:
        """Give the reader the buffers whose copies are done; wait for the oldest where too many are not."""
        while self._in_flight:
            buffer, copied = self._in_flight[0]
            if len(self._in_flight) >= _UNFINISHED_COPIES:
                copied.synchronize()
            elif not copied.query():
                return
            self._in_flight.popleft()
            self._empty.put(buffer)

    def _read_batches(self) -> None:
        """The thread's work."""
        first = self._first_read
        try:
            while (buffer := self._empty.get()) is not None and not self._closed.is_set():
                samples = np.arange(first, first + self._size)
                positions, flips = shuffled(samples, len(self._shards), self._seed)
                self._shards.moments(positions, flips, out=buffer.moments)
                buffer.labels.numpy()[:] = self._shards.class_ids[positions]
                self._filled.put(buffer)
                first += self._stride
        except Exception as error:  # raised where the batch is asked for
            self._filled.put(error)
