"""A request on its way through the engine: request > image > row (one network evaluation).

    GenerationRequest   what is asked for, validated; never changes
    ImageJob            one image of it: its place in the scheduler and its step
    Ticket              the engine's side of one accepted request: its jobs, the future of each image, and
                        when what happened; whoever holds it waits for the futures
    Watcher             who is told on the way, of steps, of the place in the queue, and of previews

Nothing here holds a tensor, a queue or a lock.
"""

from __future__ import annotations

import contextlib
import math
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "PRIORITIES",
    "GenerationRequest",
    "ImageJob",
    "LaneName",
    "Preview",
    "Priority",
    "Ticket",
    "Watcher",
]

Priority = Literal["high", "normal", "low"]
PRIORITIES: Final[tuple[Priority, ...]] = ("high", "normal", "low")


class LaneName(NamedTuple):
    """A lane makes the images of one version of one model: two versions have nothing in common but a name."""

    model: str
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One request for `num_images` images of one class by one model."""

    request_id: str
    model: str
    class_label: int
    guidance_scale: float
    """1 turns guidance off: the image then costs one row a step instead of two."""
    num_inference_steps: int
    sampler: str
    seed: int
    image_index: int = 0
    """Noise stream of the first image; image j of the request uses (seed, image_index + j)."""
    guidance_interval: tuple[int, int] | None = None
    """Least and greatest timestep with guidance; at other steps the image costs one row. None: everywhere."""
    num_images: int = 1
    priority: Priority = "normal"
    timeout_s: float | None = None
    """Seconds from submission after which the request is given up; None: it has as long as it takes."""
    num_previews: int = 0
    """Previews of each image, spread evenly over its steps; at most one a step but the last."""
    version: int = 1
    """Of the model: which of its loads."""

    @property
    def lane(self) -> LaneName:
        """What makes the images."""
        return LaneName(self.model, self.version)

    def preview_index(self, steps_done: int) -> int | None:
        """Which preview, from 0, is due after so many steps; None if none is."""
        steps = self.num_inference_steps
        previews = min(self.num_previews, steps - 1)
        if not 0 < steps_done < steps:
            return None
        index = -(-steps_done * (previews + 1) // steps) - 1  # the last one that is due by now, rounded up
        due = 0 <= index < previews and (index + 1) * steps // (previews + 1) == steps_done
        return index if due else None


class ImageJob:
    """One image in the making. The engine's thread alone changes it."""

    __slots__ = ("image_index", "request", "result", "slot", "step_index", "ticket")

    def __init__(self, ticket: Ticket, image_index: int) -> None:
        self.ticket = ticket
        self.request = ticket.request
        self.image_index = image_index
        self.slot: int | None = None
        """Where its latents live while it is being denoised."""
        self.step_index = 0
        """Denoising steps done."""
        self.result: Future[NDArray[np.uint8]] = Future()
        """Its pixels, (height, width, 3)."""

    @property
    def finished(self) -> bool:
        """Whether all denoising steps are done."""
        return self.step_index >= self.request.num_inference_steps

    @property
    def guided(self) -> bool:
        """Whether its next step is one with guidance."""
        return self.step_index in self.ticket.guided_steps

    @property
    def num_rows(self) -> int:
        """Network evaluations that its next step costs."""
        return 2 if self.guided else 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """A rough picture of an unfinished image."""

    job: ImageJob
    index: int
    """From 0, of the image's previews."""
    steps_done: int
    pixels: NDArray[np.uint8]
    """(h, w, 3), of the size of the latents."""


class Watcher(Protocol):
    """Who watches a request; called in the engine's thread, which it must not hold up."""

    def changed(self, previews: Sequence[Preview]) -> None:
        """The request's steps or its place in the queue have changed; `previews` are new."""


class Ticket:
    """One accepted request. Its futures are settled exactly once each; later attempts change nothing.

    The moments are readings of the engine's clock, in seconds: submitted, first image on the device, last
    image denoised, last image decoded.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        submitted_at: float,
        watcher: Watcher | None = None,
        guided_steps: range | None = None,
    ) -> None:
        """`guided_steps`: at which its images are guided; None: at all of them, or with a scale of 1 none."""
        self.request = request
        if guided_steps is None:
            guided_steps = range(0 if request.guidance_scale == 1.0 else request.num_inference_steps)
        self.guided_steps = guided_steps
        self.watcher = watcher
        self.queue_position: int | None = None
        """While no image has started, 1 for the next request of its lane; None where nobody watches."""
        self.jobs = tuple(
            ImageJob(self, request.image_index + offset) for offset in range(request.num_images)
        )
        self.unmade = self.jobs
        """The images that an engine is to make: all, or after `restart` those that have no answer yet."""
        self.restarts = 0
        self.previewed = False
        """Whether there has been a preview."""
        self.given_up = False
        """Whether somebody has begun to cancel it or to fail it; its engine's lock guards this."""
        self.submitted_at = submitted_at
        self.started_at: float | None = None
        self.denoised_at: float | None = None
        self.decoded_at: float | None = None

    @property
    def deadline(self) -> float:
        """When the request is to be given up; infinity where it has as long as it takes."""
        timeout_s = self.request.timeout_s
        return math.inf if timeout_s is None else self.submitted_at + timeout_s

    @property
    def done(self) -> bool:
        """Whether every image is made, failed or given up."""
        return all(job.result.done() for job in self.jobs)

    @property
    def made(self) -> bool:
        """Whether every image is made."""
        results = [job.result for job in self.jobs]
        return all(
            result.done() and not result.cancelled() and result.exception() is None for result in results
        )

    @property
    def steps_done(self) -> int:
        """Denoising steps done, of all images."""
        return sum(job.step_index for job in self.jobs)

    @property
    def stage(self) -> str:
        """The stage of the engine that the request is in, or was when it was given up."""
        if self.started_at is None:
            return "queue"
        return "decode" if all(job.finished for job in self.jobs) else "denoise"

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds in the stages of the engine; they add up to the time from submission to the last image."""
        if self.started_at is None or self.denoised_at is None or self.decoded_at is None:
            raise RuntimeError(f"request {self.request.request_id} has not been through all stages")
        return {
            "queue": self.started_at - self.submitted_at,
            "denoise": self.denoised_at - self.started_at,
            "decode": self.decoded_at - self.denoised_at,
        }

    @property
    def num_rows(self) -> int:
        """Network evaluations that the images to be made cost in all."""
        return len(self.unmade) * (self.request.num_inference_steps + len(self.guided_steps))

    def restart(self) -> None:
        """Have the images without an answer made from their first step, by another engine than before.

        No thread of the one before may run any more.
        """
        self.unmade = tuple(job for job in self.jobs if not job.result.done())
        for job in self.unmade:
            job.slot = None
            job.step_index = 0
        self.started_at = self.denoised_at = self.queue_position = None
        self.restarts += 1

    def fail(self, error: Exception) -> bool:
        """Answer every image that has no answer yet with `error`; False if all of them have one."""
        failed = False
        for job in self.jobs:
            with contextlib.suppress(InvalidStateError):
                job.result.set_exception(error)
                failed = True
        return failed

    def cancel(self) -> bool:
        """Give up every image that has no answer yet; False if all of them have one."""
        given_up = [
            job.result.cancel() for job in self.jobs
        ]  # all of them, which any() alone would not reach
        return any(given_up)
