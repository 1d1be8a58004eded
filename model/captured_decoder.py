"""The decoder as CUDA graphs: latents to 8-bit pixels in one launch.

A decoder is some 200 launches from Python, during which no other thread of the process runs Python: launched
one by one, each decoded image holds up the denoising steps of all others. There is a graph for each number of
images in `sizes`; a batch is copied in, filled up to the next size, and read back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model.cuda_graph import Captures, capture_order

__all__ = ["DECODED_SIZES", "CapturedDecoder"]

DECODED_SIZES = (1, 2, 4)
"""Images of the captured decoders: at 256 px and more, four fill a GPU."""

_Launch = Callable[[], Tensor]


class CapturedDecoder:
    """`decode`, latents (n, C, h, w) fp32 to pixels (n, height, width, 3) uint8, both on `device`.

    A size is captured at its first use, which takes a few decodings' time.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        *,
        latent_shape: tuple[int, int, int],
        device: torch.device,
        sizes: Sequence[int] = DECODED_SIZES,
    ) -> None:
        self._decode = decode
        self._latent_shape, self._device, self._sizes = latent_shape, device, tuple(sorted(sizes))
        self._captured: dict[int, tuple[Tensor, _Launch]] = {}
        self._lock = threading.Lock()
        self._captures = Captures(device)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels (n, height, width, 3) uint8 on the CPU."""
        return torch.cat([self._pixels(part) for part in latents.split(self._sizes[-1])])

    def sizes(self, *, max_images: int) -> list[int]:
        """Images of the batches that have to be decoded for batches of up to so many to be captured, in the
        best order.
        """
        return capture_order(self._sizes, max_images)

    def _pixels(self, latents: Tensor) -> Tensor:
        num_images = len(latents)
        size = next(size for size in self._sizes if size >= num_images)
        with self._lock:  # of the tensors that all batches of a size pass through
            if size not in self._captured:
                held = torch.zeros(size, *self._latent_shape, device=self._device)
                self._captured[size] = held, self._captures.capture(partial(self._decode, held))
            held, decode = self._captured[size]
            held[:num_images].copy_(latents)
            return decode()[:num_images].to("cpu", copy=True)
