"""Latents to pixels, apart from the denoising loop: in its own thread and, on CUDA, on its own stream.

Whatever waits is decoded in order of arrival, in batches of one model, at most `max_batch` images each. An
image whose latents are not finite, or whose decoding raises, fails alone.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import torch

from model.device import make_current

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from service.engine.pipeline import ServedPipeline
    from service.engine.request import ImageJob
    from service.engine.runner import FinishedLatents

__all__ = ["MAX_DECODE_BATCH", "Decoder", "DecoderListener"]

MAX_DECODE_BATCH: Final = 4
"""Images that are decoded together."""

_logger = logging.getLogger(__name__)


class DecoderListener(Protocol):
    """Who hears of each image; called in the decoder's thread."""

    def backlog_shrunk(self) -> None:
        """An image has left the backlog: made, failed, or given up before."""

    def image_decoded(self, job: ImageJob, pixels: NDArray[np.uint8]) -> None:
        """The image is made: pixels (height, width, 3)."""

    def image_failed(self, job: ImageJob, error: Exception) -> None:
        """The image cannot be made."""

    def decoder_stopped(self, error: BaseException | None) -> None:
        """The thread has ended, with an error if it was not asked to."""


@dataclass(frozen=True, eq=False)
class _Item:
    job: ImageJob
    latents: Tensor
    """(C, H, W) fp32."""
    ready: torch.cuda.Event | None
    pipeline: ServedPipeline


class Decoder:
    """A thread that decodes what the runners of one device finish; it keeps no model beyond its images."""

    def __init__(
        self, device: torch.device, listener: DecoderListener, *, max_batch: int = MAX_DECODE_BATCH
    ) -> None:
        self.max_batch = max_batch
        self._device = device
        self._listener = listener
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._pending: deque[_Item] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._backlog = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="lamamba-decoder", daemon=True)

    @property
    def backlog(self) -> int:
        """Images handed over and not yet settled."""
        return self._backlog

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, finished: FinishedLatents) -> None:
        """Queue images; returns at once."""
        with self._lock:
            self._backlog += len(finished.jobs)
        for job, latents in zip(finished.jobs, finished.latents, strict=True):
            self._inbox.put(_Item(job, latents, finished.ready, finished.pipeline))

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the thread once it has decoded what it was given; False if `timeout_s` was too short."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failure: BaseException | None = None
        make_current(self._device)
        try:
            while self._decode_next():
                pass
        except BaseException as error:  # the listener answers whoever still waits, and the log has the trace
            _logger.exception("the decoder has failed")
            failure = error
        finally:
            self._listener.decoder_stopped(failure)

    def _decode_next(self) -> bool:
        """Decode the next batch, which is forgotten with its model; False when the thread is to end."""
        batch = self._next_batch()
        self._decode(batch)
        return bool(batch)

    def _next_batch(self) -> list[_Item]:
        """The next images of one model, in order of arrival; none when the thread is to end."""
        while not self._pending or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                self._inbox.put(None)  # stays the last one: the pending images go first
                break
            self._pending.append(item)
        batch: list[_Item] = []
        while self._pending and len(batch) < self.max_batch:
            if batch and self._pending[0].pipeline is not batch[0].pipeline:
                break
            batch.append(self._pending.popleft())
        return batch

    def _decode(self, batch: Sequence[_Item]) -> None:
        wanted: list[_Item] = []
        for item in batch:
            if item.job.result.done():  # given up, or failed with another image of its request
                self._settle()
            else:
                wanted.append(item)
        if not wanted:
            return
        pipeline = wanted[0].pipeline
        with torch.inference_mode(), self._own_stream(wanted):
            latents = torch.stack([item.latents for item in wanted])  # (n, C, H, W)
            finite = torch.isfinite(latents).flatten(1).all(1).tolist()
            for item, is_finite in zip(wanted, finite, strict=True):
                if not is_finite:
                    self._fail(item.job, ArithmeticError("the denoised latents are not finite"))
            jobs = [item.job for item, is_finite in zip(wanted, finite, strict=True) if is_finite]
            if jobs:
                self._decode_finite(pipeline, jobs, latents[torch.tensor(finite)])

    def _decode_finite(self, pipeline: ServedPipeline, jobs: Sequence[ImageJob], latents: Tensor) -> None:
        try:
            pixels = pipeline.decode(latents).numpy()  # (n, height, width, 3)
        except torch.AcceleratorError:  # after it every call on the device fails: only a restart helps
            raise
        except Exception as error:  # whatever one image's decoding raises is that image's failure alone
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            _logger.warning("decoding %d images together failed (%s); decoding them singly", len(jobs), error)
            for index, job in enumerate(jobs):
                self._decode_finite(pipeline, [job], latents[index : index + 1])
            return
        for job, image in zip(jobs, pixels, strict=True):
            self._settle()
            self._listener.image_decoded(job, image)

    def _fail(self, job: ImageJob, error: Exception) -> None:
        self._settle()
        self._listener.image_failed(job, error)

    def _settle(self) -> None:
        with self._lock:
            self._backlog -= 1
        self._listener.backlog_shrunk()

    def _own_stream(self, items: Sequence[_Item]) -> AbstractContextManager[object]:
        events = [item.ready for item in items if item.ready is not None]
        if not events:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        for event in events:
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)
