"""When the images of a lane begin and when they leave it: the policy of the scheduler.

    continuous   an image begins at any step at which there is room, and leaves when it is finished
    static       dynamic batching, as servers do it that run whole requests: a batch begins with `max_images`,
                 or when the first of its images has waited `wait_s`; nobody joins it, and its images leave
                 together, when the last of them is finished

Static batching is here to be measured against. It gets what helps it: a finished image costs no further row,
the images that came during a batch need not wait again, and a full batch does not wait at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    from service.engine.request import ImageJob

__all__ = ["CONTINUOUS", "Batching", "Lane", "StaticBatching"]


class Lane(Protocol):
    """What a policy sees of a lane."""

    @property
    def num_active(self) -> int:
        """Images that hold a slot."""

    @property
    def num_waiting(self) -> int:
        """Images that wait for one."""

    @property
    def first_submitted_at(self) -> float:
        """When the first of those was submitted; only where there is one."""


class Batching(Protocol):
    """A policy; the same one for all lanes, so it keeps nothing of any."""

    @property
    def max_images(self) -> float:
        """Images that hold slots of a lane at once, whatever their rows."""

    def opens_at(self, lane: Lane) -> float:
        """From when on a lane with waiting images gives out slots; infinity: not before something changes."""

    def leaving(self, active: Collection[ImageJob]) -> tuple[ImageJob, ...]:
        """The finished images, of those that hold slots of a lane, that go now."""


@dataclass(frozen=True)
class _ContinuousBatching:
    max_images: float = math.inf

    def opens_at(self, lane: Lane) -> float:
        return -math.inf

    def leaving(self, active: Collection[ImageJob]) -> tuple[ImageJob, ...]:
        return tuple(job for job in active if job.finished)


CONTINUOUS: Final[Batching] = _ContinuousBatching()
"""Images join and leave at any step."""


@dataclass(frozen=True, kw_only=True)
class StaticBatching:
    """Batches that are closed before they begin. Raises ValueError for less than one image or below 0 s."""

    max_images: int
    """Images of a batch."""
    wait_s: float
    """Seconds from the submission of the first waiting image after which a batch begins that is not full."""

    def __post_init__(self) -> None:
        if self.max_images < 1:
            raise ValueError(f"batch_size: {self.max_images} given; 1 or more is accepted")
        if not 0 <= self.wait_s < math.inf:
            raise ValueError(f"batch_wait: {self.wait_s} s given; 0 or more is accepted")

    def opens_at(self, lane: Lane) -> float:
        """Never during a batch; at once for a full one; else when the first image has waited long enough."""
        if lane.num_active:
            return math.inf
        if lane.num_waiting >= self.max_images:
            return -math.inf
        return lane.first_submitted_at + self.wait_s

    def leaving(self, active: Collection[ImageJob]) -> tuple[ImageJob, ...]:
        """All of the batch, once each of them is finished."""
        return tuple(active) if all(job.finished for job in active) else ()
