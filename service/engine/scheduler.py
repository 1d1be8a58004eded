"""Which images take the next denoising step. Holds no tensor and knows neither device nor clock.

    lane    one version of a model, at one resolution: only its images can share a network call
    slot    a place for one image's latents in a lane; an image holds it from its first step to its last
    row     one network evaluation: two at an image's step with guidance, else one; a step has at most
            `max_rows`

Between requests of a lane, free slots go to the one that counts as the earliest: a request counts as
submitted `aging_s` seconds later for each priority that it is below high, so it is overtaken by those of
the priority above that come up to `aging_s` after it, and by no others: nobody starves. Between requests of
one priority, slots are given in turn (round robin), so that one image does not wait behind sixteen of
another client; an image that does not fit the rows left is not overtaken by a smaller one. An image that
comes into its guidance interval needs a second row, and a device may run out of memory: where the images of
a lane need more rows than a step has, they take turns, those that were left out first. Between lanes,
the turn goes to the one with the least virtual time, which is device time used, with no credit for having
been idle (start-time fair queueing, Goyal et al. 1996): n busy lanes get 1/n of the device each, whatever
their steps cost, and a lane waits at most for a step of each other lane and its own lead, which is one step.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from service.engine.batching import CONTINUOUS
from service.engine.request import PRIORITIES
from service.engine.row_limit import RowLimit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from service.engine.batching import Batching
    from service.engine.request import ImageJob, LaneName, Ticket

__all__ = ["AGING_S", "PlannedStep", "Scheduler"]

AGING_S: Final = 30.0
"""Seconds of waiting that lift a request by one priority."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """The next step: the images of `lane` that hold a slot and are not finished, as many as a step has room
    for.
    """

    lane: LaneName
    jobs: tuple[ImageJob, ...]
    admitted: tuple[ImageJob, ...]
    """Those of them that were given their slot just now."""
    num_rows: int
    """Network evaluations of the step."""


class _Lane:
    def __init__(self, name: LaneName, num_slots: int) -> None:
        self.name = name
        self.waiting: dict[str, OrderedDict[Ticket, deque[ImageJob]]] = {
            priority: OrderedDict() for priority in PRIORITIES
        }
        self.active: dict[int, ImageJob] = {}
        self.free_slots = list(range(num_slots))
        self.virtual_time_s = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.active) or self.has_waiting

    @property
    def has_waiting(self) -> bool:
        return any(self.waiting.values())

    @property
    def num_active(self) -> int:
        return len(self.active)

    @property
    def num_waiting(self) -> int:
        return sum(len(jobs) for queue in self.waiting.values() for jobs in queue.values())

    @property
    def first_submitted_at(self) -> float:
        return min(ticket.submitted_at for queue in self.waiting.values() for ticket in queue)

    @property
    def num_rows(self) -> int:
        return sum(job.num_rows for job in self.active.values())

    def take_turn(self, max_rows: int) -> tuple[ImageJob, ...]:
        """The unfinished images of the next step, at least one; those left out come first at the next one."""
        unfinished = [job for job in self.active.values() if not job.finished]
        taken: list[ImageJob] = []
        rows_left = max_rows
        for job in unfinished:
            if job.num_rows <= rows_left or not taken:
                taken.append(job)
                rows_left -= job.num_rows
        if len(taken) < len(unfinished):
            for slot in [job.slot for job in taken if job.slot is not None]:
                self.active[slot] = self.active.pop(slot)
        return tuple(taken)


class Scheduler:
    """Queues, slots and turns of all lanes of one device. Used by one thread."""

    def __init__(
        self,
        lanes: Iterable[LaneName],
        *,
        max_rows: int,
        aging_s: float = AGING_S,
        batching: Batching = CONTINUOUS,
    ) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows: {max_rows} given; a guided image needs 2 or more")
        self.max_rows = max_rows
        self.row_limit = RowLimit(max_rows)
        """Rows of the next step, which whoever runs the steps tells how they went."""
        self.opens_at = math.inf
        """When a lane begins the batch that the last `schedule` held back; infinity: there is none."""
        self._batching = batching
        self._handicaps_s = {priority: rank * aging_s for rank, priority in enumerate(PRIORITIES)}
        # Replaced whole, never changed: other threads read how much there is to do.
        self._lanes = {name: _Lane(name, max_rows) for name in lanes}
        self._virtual_time_s = 0.0

    @property
    def num_waiting(self) -> int:
        """Images that wait for a slot."""
        return sum(lane.num_waiting for lane in self._lanes.values())

    @property
    def num_active(self) -> int:
        """Images that hold a slot."""
        return sum(lane.num_active for lane in self._lanes.values())

    def add_lane(self, name: LaneName) -> None:
        """Schedule a further lane."""
        self._lanes = self._lanes | {name: _Lane(name, self.max_rows)}

    def remove_lane(self, name: LaneName) -> bool:
        """Forget a lane that has nothing to do, or is not there; False for one that has work."""
        if name in self._lanes and self._lanes[name].busy:
            return False
        self._lanes = {other: lane for other, lane in self._lanes.items() if other != name}
        return True

    def add(self, ticket: Ticket) -> None:
        """Queue the images of a request."""
        lane = self._lanes[ticket.request.lane]
        if not lane.busy:
            lane.virtual_time_s = max(lane.virtual_time_s, self._virtual_time_s)
        lane.waiting[ticket.request.priority][ticket] = deque(ticket.unmade)

    def schedule(self, now: float, *, admit: bool = True) -> PlannedStep | None:
        """The next step, or None when there is nothing to do; `admit` False gives out no further slots.

        `now` is a reading of the clock that the requests were submitted by.
        """
        openings = {
            lane.name: self._batching.opens_at(lane) for lane in self._lanes.values() if lane.has_waiting
        }
        self.opens_at = min((at for at in openings.values() if at > now), default=math.inf)
        admitting = {name for name, at in openings.items() if admit and at <= now}
        candidates = [lane for lane in self._lanes.values() if lane.active or lane.name in admitting]
        if not candidates:
            return None
        lane = min(candidates, key=lambda candidate: candidate.virtual_time_s)
        self._virtual_time_s = lane.virtual_time_s
        admitted = self._fill_slots(lane) if lane.name in admitting else ()
        jobs = lane.take_turn(self.row_limit.value)
        num_rows = sum(job.num_rows for job in jobs)
        return PlannedStep(lane=lane.name, jobs=jobs, admitted=admitted, num_rows=num_rows)

    def charge(self, lane: LaneName, seconds: float) -> None:
        """Book device time that a step of `lane` took."""
        self._lanes[lane].virtual_time_s += seconds

    def release(self, job: ImageJob) -> None:
        """Take one image out of its slot, which the next step may fill again."""
        lane = self._lanes[job.request.lane]
        if job.slot is not None and lane.active.get(job.slot) is job:
            del lane.active[job.slot]
            lane.free_slots.append(job.slot)
            job.slot = None

    def drop(self, ticket: Ticket) -> int:
        """Take all images of a request out of queue and slots; returns how many of them were still queued."""
        request = ticket.request
        lane = self._lanes.get(request.lane)
        if lane is None:  # it had nothing more to do, not for this request either
            return 0
        for job in ticket.jobs:
            self.release(job)
        return len(lane.waiting[request.priority].pop(ticket, ()))

    def queue(self, lane: LaneName) -> Iterator[Ticket]:
        """The requests of a lane with queued images, in the order in which slots are given to them."""
        heads = [deque(queue) for queue in self._lanes[lane].waiting.values()]
        while any(heads):
            yield min((head for head in heads if head), key=lambda head: self._counts_as(head[0])).popleft()

    def leaving(self, lane: LaneName) -> tuple[ImageJob, ...]:
        """Finished images of a lane that go to the decoder now, still in their slots."""
        return self._batching.leaving(self._lanes[lane].active.values())

    def _fill_slots(self, lane: _Lane) -> tuple[ImageJob, ...]:
        """The images that were given slots: they and those that had some fit the next step together."""
        admitted: list[ImageJob] = []
        rows_left = self.row_limit.value - lane.num_rows
        while lane.has_waiting and lane.free_slots and lane.num_active < self._batching.max_images:
            ticket = min((next(iter(queue)) for queue in lane.waiting.values() if queue), key=self._counts_as)
            queue = lane.waiting[ticket.request.priority]
            jobs = queue[ticket]
            if jobs[0].num_rows > rows_left and lane.active:
                break
            job = jobs.popleft()
            job.slot = lane.free_slots.pop()
            lane.active[job.slot] = job
            admitted.append(job)
            rows_left -= job.num_rows
            if jobs:
                queue.move_to_end(ticket)
            else:
                del queue[ticket]
        return tuple(admitted)

    def _counts_as(self, ticket: Ticket) -> float:
        """When a request counts as submitted, which needs no clock: all requests age alike."""
        return ticket.submitted_at + self._handicaps_s[ticket.request.priority]
