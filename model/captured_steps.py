"""Denoising steps as CUDA graphs: network, guidance and sampler update in one launch.

A step of the XL network is some 3,000 kernels, which a host launches in 30 ms whatever their size; at few
rows a GPU runs them in 5. A graph holds shapes and addresses, so there is one for each number of images in
`sizes` with all of them guided, half of them, or none. A batch is copied in, filled up to the next size and
guided images, and copied out; rows that fill it up change nothing in the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from model.cuda_graph import Captures, capture_order
from model.diffusion.step import StepBatch

__all__ = ["CAPTURED_SIZES", "CapturedSteps", "StepFunction"]

CAPTURED_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Images of the captured steps. From 64 images on a GPU is busy without: larger batches run uncaptured."""

# From so many rows on XL's kernels take as long as their launches: a graph must not cost many more rows then.
_BUSY_ROWS = 40
_MOST_FILLED_UP = 1.2

# Steps of these numbers of images are also captured with guidance for half of them. Of fewer, the rows that
# this saves take little time; of more, a step with guidance for some would mostly run uncaptured.
_HALVED = range(4, 33)

StepFunction = Callable[[StepBatch], tuple[Tensor, Tensor]]
_Launch = Callable[[], tuple[Tensor, Tensor]]
_Size = tuple[int, int]
"""Images, and guided ones among them."""


class CapturedSteps:
    """`step`, the `denoise_step` of one network: a `StepBatch` in, latents and history out.

    A size is captured at its first use, which takes a few steps' time;
    `capture_all` does that before.
    """

    def __init__(
        self,
        step: StepFunction,
        *,
        latent_shape: tuple[int, int, int],
        device: torch.device,
        sizes: Sequence[int] = CAPTURED_SIZES,
    ) -> None:
        self.uncaptured = step
        """What runs batches that fit no size."""
        self._latent_shape, self._device, self._sizes = latent_shape, device, tuple(sorted(sizes))
        self._captured: dict[_Size, tuple[StepBatch, _Launch]] = {}
        self._lock = threading.Lock()
        self._captures = Captures(device)

    @torch.inference_mode()
    def __call__(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """What `denoise_step` returns, (images, C, H, W) fp32 each, in tensors of their own."""
        num_images, num_guided = batch.latents.shape[0], batch.guided.shape[0]
        size = self._size(num_images, num_guided)
        if size is None:
            return self.uncaptured(batch)
        with self._lock:  # of the tensors that all batches of a size pass through
            held, step = self._captured_step(size)
            _fill(held, batch)
            latents, history = step()
            return latents[:num_images].clone(), history[:num_images].clone()

    def num_rows(self, num_images: int, num_guided: int) -> int:
        """Rows that a step of so many images is run with, those that fill it up included."""
        size = self._size(num_images, num_guided)
        return num_images + num_guided if size is None else sum(size)

    @torch.inference_mode()
    def capture_all(self, *, max_images: int, conditional: bool) -> Iterator[None]:
        """Capture every size up to the one that holds `max_images`, largest first: they share its memory.
        Each `next` captures one.

        `conditional`: also with guidance, which an unconditional model does not have.
        """
        for size in capture_order(self._sizes, max_images):
            for num_guided in _guided_sizes(size) if conditional else (0,):
                self._captured_step((size, num_guided))
                yield

    def _size(self, num_images: int, num_guided: int) -> _Size | None:
        """That of the captured step that runs a batch; None where it runs uncaptured."""
        size = next((size for size in self._sizes if size >= num_images), None)
        if size is None:
            return None
        guided = min(guided for guided in _guided_sizes(size) if guided >= num_guided)
        return None if _costs_more(num_images + num_guided, size + guided) else (size, guided)

    def _captured_step(self, size: _Size) -> tuple[StepBatch, _Launch]:
        if size not in self._captured:
            num_images, num_guided = size
            held = StepBatch.blank(num_images, self._latent_shape, num_guided=num_guided, device=self._device)
            self._captured[size] = held, self._captures.capture(partial(self.uncaptured, held))
        return self._captured[size]


def _guided_sizes(num_images: int) -> tuple[int, ...]:
    """Guided images of the captured steps of so many images, the most first."""
    return (num_images, num_images // 2, 0) if num_images in _HALVED else (num_images, 0)


def _costs_more(rows: int, filled_up: int) -> bool:
    """Whether the rows that fill a batch up take longer than the launches that a graph saves."""
    return rows > _BUSY_ROWS and filled_up > _MOST_FILLED_UP * rows


def _fill(held: StepBatch, batch: StepBatch) -> None:
    """Copy `batch` into the first rows of `held`, in place; all of `held.guided` are guided images of it."""
    num_images = batch.latents.shape[0]
    for name in (field.name for field in fields(StepBatch)):
        target, value = getattr(held, name), getattr(batch, name)
        if name == "guided":
            target[: len(value)].copy_(value)
            target[len(value) :].copy_(value[:1].expand(len(target) - len(value)))
        elif value is None:
            target.zero_()  # noise, of a batch without a stochastic step
        else:
            target[:num_images].copy_(value)
