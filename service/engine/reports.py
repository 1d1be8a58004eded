"""What the watchers of requests are told between two steps: steps, previews, and the place in the queue.

    previews()      when a step is launched: those that are due after it
    report_steps()  when it is done: the images that it moved, with these previews
    report_queue()  after each step: the requests that wait, where others before them have gone

A preview that cannot be made costs no image.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from service.engine.request import Preview

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.engine.request import ImageJob, Ticket
    from service.engine.runner import Runner
    from service.engine.scheduler import PlannedStep, Scheduler
    from service.metrics import Metrics

__all__ = ["Reports"]

_logger = logging.getLogger(__name__)


class Reports:
    """Tells the watchers of one engine's requests; used by the engine's thread alone."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._waiting: set[Ticket] = set()

    def add(self, ticket: Ticket) -> None:
        """Tell the watcher of a request, if it has one, of its place in the queue from now on."""
        if ticket.watcher is not None:
            self._waiting.add(ticket)

    def forget(self, ticket: Ticket) -> None:
        """A request has left the queue."""
        self._waiting.discard(ticket)

    def previews(self, plan: PlannedStep, runner: Runner) -> Sequence[Preview]:
        """Those due after a step that `runner` has launched, as its `preview` makes them: filled in later."""
        return _previews(runner, [job for job in plan.jobs if job.ticket.watcher is not None])

    def report_steps(self, plan: PlannedStep, previews: Sequence[Preview]) -> None:
        """Tell of a step that is done."""
        told: dict[Ticket, list[Preview]] = {
            job.ticket: [] for job in plan.jobs if job.ticket.watcher is not None
        }
        for preview in previews:
            told.setdefault(preview.job.ticket, []).append(preview)
        for ticket, new in told.items():
            if new and not ticket.previewed:
                ticket.previewed = True
                self._metrics.time_to_first_preview.observe(self._clock() - ticket.submitted_at)
            if ticket.watcher is not None:
                ticket.watcher.changed(new)

    def report_queue(self) -> None:
        """Tell of the places that have changed."""
        for lane in {ticket.request.lane for ticket in self._waiting}:
            for position, ticket in enumerate(self._scheduler.queue(lane), start=1):
                if ticket in self._waiting and ticket.queue_position != position:
                    ticket.queue_position = position
                    if ticket.watcher is not None:
                        ticket.watcher.changed(())


def _previews(runner: Runner, jobs: Sequence[ImageJob]) -> list[Preview]:
    """The previews that are due; an image that is finished, or has failed, has given its slot back."""
    due = {
        job: index
        for job in jobs
        if job.slot is not None and (index := job.request.preview_index(job.step_index)) is not None
    }
    if not due:
        return []
    try:
        pixels = runner.preview(list(due))  # (n, h, w, 3)
    except torch.AcceleratorError:
        raise
    except Exception:  # an image is worth more than the picture of its being made
        _logger.exception("previews of %d images failed; the images go on", len(due))
        return []
    return [
        Preview(job=job, index=index, steps_done=job.step_index, pixels=picture)
        for (job, index), picture in zip(due.items(), pixels, strict=True)
    ]
