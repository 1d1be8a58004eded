"""The loop that joins scheduler, runners and decoder: one engine, one device, one thread.

    submit() --commands--> [ schedule -> run -> postprocess ] --latents--> decoder --futures--> whoever
    holds the ticket
     any thread              the engine's thread, step by step              its own thread

A request joins at the step after it arrives, and a finished image leaves at once (what else there is to
compare with is in batching.py). A GPU has the next step before it is done with this one, so it never waits
for the host; what follows from a step's end then happens a step later. Other threads never touch the
scheduler or the slots: they put commands into the inbox, which the engine's thread runs between steps. What
is shared (the tickets not yet answered, the number of images waiting) is behind one lock that is never held
during a step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from model.device import make_current
from model.diffusion.guidance import guided_steps
from model.diffusion.samplers import sampler_table
from service.engine.batching import CONTINUOUS
from service.engine.decode import Decoder
from service.engine.reports import Reports
from service.engine.request import GenerationRequest, ImageJob, Ticket, Watcher
from service.engine.runner import Runner
from service.engine.scheduler import AGING_S, PlannedStep, Scheduler
from service.errors import DeadlineExceeded, Draining, EngineStopped, GenerationFailed, QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from service.engine.batching import Batching
    from service.engine.pipeline import ServedPipeline
    from service.engine.request import LaneName, Preview
    from service.engine.runner import FinishedLatents
    from service.metrics import Metrics

__all__ = ["Engine"]

_MAX_RETRY_AFTER_S = 60.0
_STOPPED = "the engine has stopped; this server is about to be restarted"

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _LaunchedStep:
    """A step that the device may still be at, and what follows when it is done."""

    plan: PlannedStep
    launched_at: float
    finished: list[FinishedLatents] = field(default_factory=list)
    """Images that left the lane with it, for the decoder."""
    previews: Sequence[Preview] = ()
    done: torch.cuda.Event | None = None


class Engine:
    """Makes the images of accepted requests, many at once."""

    def __init__(
        self,
        pipelines: Mapping[LaneName, ServedPipeline],
        *,
        max_rows: int,
        max_queue_images: int,
        metrics: Metrics,
        priority_aging_s: float = AGING_S,
        batching: Batching = CONTINUOUS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = next(iter(pipelines.values())).device
        self.max_rows = max_rows
        self._scheduler = Scheduler(pipelines, max_rows=max_rows, aging_s=priority_aging_s, batching=batching)
        self._runners = {lane: Runner(pipeline, num_slots=max_rows) for lane, pipeline in pipelines.items()}
        self._decoder = Decoder(self.device, self)
        self._max_decode_backlog = max_rows
        self._launched: deque[_LaunchedStep] = deque()  # the engine's thread's own
        self._steps_ahead = 1 if self.device.type == "cuda" else 0
        self._last_step_ended_at = -math.inf
        self.max_queue_images = max_queue_images
        self._metrics = metrics
        self._clock = clock

        self._timed: set[Ticket] = set()  # with a deadline; like the scheduler, the engine's thread's own
        self._next_deadline = math.inf  # of those, or earlier, where one has been closed since
        self._reports = Reports(self._scheduler, metrics, clock)  # the engine's thread's too
        self._warm_ups: deque[tuple[Iterator[None], Future[None]]] = deque()  # of lanes to come; likewise
        self._retired: set[LaneName] = set()  # lanes to go when their last image has; likewise

        self.on_death: Callable[[], None] | None = None
        """Called once, in a thread of the engine, when it has died: whoever sets it calls `evacuate` for the
        requests that wait, which else are answered with EngineStopped."""

        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_forever, name="lamamba-engine", daemon=True)
        self._warm = threading.Event()
        self._stopping = False
        self._draining = False
        self._failure: BaseException | None = None

        self._changed = threading.Condition()  # guards the next four
        self._joining: set[Future[None]] = set()  # of lanes to come
        self._tickets: set[Ticket] = set()
        self._open_rows = 0
        self._num_waiting_images = 0
        metrics.read_load(
            self.device,
            requests_running=partial(self._num_requests, started=True),
            requests_waiting=partial(self._num_requests, started=False),
            images_waiting=lambda: self._num_waiting_images,
            active_slots=lambda: self._scheduler.num_active,
            row_limit=lambda: self._scheduler.row_limit.value,
        )

    # --- any thread ---

    def start(self) -> None:
        """Start the threads and return when every model has run once. Raises what the first run raised."""
        self._decoder.start()
        self._thread.start()
        self._warm.wait()
        if self._failure is not None:
            raise self._failure

    def submit(self, request: GenerationRequest, watcher: Watcher | None = None) -> Ticket:
        """Accept a request, whose images come through the futures of the ticket's jobs.

        `watcher` is told of what happens on the way; without one there are no previews.
        Raises QueueFull, Draining or EngineStopped at once, before any work.
        """
        ticket = Ticket(
            request,
            submitted_at=self._clock(),
            watcher=watcher,
            guided_steps=self._guided_steps(request),
        )
        for job in ticket.jobs:  # before anybody else is told: what is answered has been counted
            job.result.add_done_callback(partial(self._count_image, ticket))
        with self._changed:
            self._check_alive()
            if self._draining:
                raise Draining("this server is shutting down and takes no further requests")
            waiting = self._num_waiting_images
            if waiting + request.num_images > self.max_queue_images:
                raise QueueFull.of(
                    waiting=waiting,
                    given=request.num_images,
                    accepted=self.max_queue_images,
                    retry_after_s=self.estimated_wait_s(waiting),
                )
            self._enqueue(ticket)
        return ticket

    def adopt(self, ticket: Ticket) -> None:
        """Accept a request that another engine had accepted, however full the queue is.

        Raises EngineStopped.
        """
        with self._changed:
            self._check_alive()
            self._enqueue(ticket)

    def add_lane(self, lane: LaneName, pipeline: ServedPipeline) -> Future[None]:
        """Make images with a further model, once it has run: its warm-up takes turns with the others' steps.

        The future's error is what the warm-up has raised, or says why the engine has ended; then the engine
        keeps nothing of the model. Raises EngineStopped.
        """
        joined: Future[None] = Future()
        with self._changed:
            self._check_alive()
            self._joining.add(joined)
        self._inbox.put(lambda: self._warm_ups.append((self._warm_up(lane, pipeline), joined)))
        return joined

    def remove_lane(self, lane: LaneName) -> None:
        """Forget a model when its accepted images have left it; to be called once no more of them come.

        Nothing happens for one that is not there.
        """
        self._inbox.put(partial(self._retired.add, lane))

    def serves(self, lane: LaneName) -> bool:
        """Whether requests for that lane can be made here."""
        return lane in self._runners

    def evacuate(self, timeout_s: float) -> list[Ticket]:
        """Of an engine that has died: the requests that wait for an answer, for another to adopt.

        If its threads do not end within `timeout_s` each, they might yet answer: then none.
        """
        ended = self._decoder.stop(timeout_s)
        self._thread.join(timeout_s)
        if not ended or self._thread.is_alive():
            self._fail_all(EngineStopped("the engine has stopped and does not end"))
            return []
        return [ticket for ticket in self._take_tickets() if not ticket.done]

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up: its slots are free at the next step. Does nothing to one that is answered, or is
        being answered by another thread.
        """
        if not self._gives_up(ticket) or not ticket.cancel():
            return
        self._metrics.cancellations.inc()
        self._metrics.request_success.labels("abort").inc()
        self._close(ticket)

    def drain(self) -> None:
        """Accept no further requests; those accepted are finished."""
        self._draining = True

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until every accepted request is answered; False if `timeout_s` was too short for that."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tickets, timeout_s)

    def stop(self) -> None:
        """End the threads; requests that are not finished are answered with Draining."""
        self._draining = True
        self._stopping = True
        self._inbox.put(_nothing)  # wakes the thread
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(Draining("this server has shut down before the request was finished"))
        self._fail_joining(Draining("this server has shut down before the model was warm"))
        self._decoder.stop()

    @property
    def alive(self) -> bool:
        """Whether the engine works, or can: False once one of its threads has died."""
        return self._failure is None and not self._stopping

    @property
    def open_rows(self) -> int:
        """Network evaluations of the requests that wait for an answer, those done included.

        A measure of load that costs nothing to read, which happens for every request.
        """
        return self._open_rows

    @property
    def num_waiting_images(self) -> int:
        """Images that wait for a slot."""
        return self._num_waiting_images

    @property
    def failure(self) -> BaseException | None:
        """What one of the threads has died of."""
        return self._failure

    @property
    def idle(self) -> bool:
        """Whether every accepted request is answered."""
        return not self._tickets

    @property
    def draining(self) -> bool:
        """Whether requests are turned away because the end is near."""
        return self._draining

    def estimated_wait_s(self, num_images: int) -> float:
        """Seconds in which `num_images` are made at the rate of the last minute, 1 to 60."""
        rate = self._metrics.image_rate.per_second()
        return min(_MAX_RETRY_AFTER_S, max(1.0, num_images / rate if rate else _MAX_RETRY_AFTER_S / 6))

    # --- the engine's thread ---

    def step(self) -> bool:
        """Launch one denoising step of one lane and finish the one before, then do a part of a warm-up; False
        when there was nothing to do.
        """
        self._receive()
        self._expire()
        for lane in self._runners:  # those that only waited for an image that has been given up
            self._hand_over(lane)
        self._forget_lanes()
        plan = self._scheduler.schedule(self._clock(), admit=self._decoder.backlog < self._max_decode_backlog)
        if plan is None:
            return self._finish_steps(0) or self._warm_up_further()
        self._note_start(plan)
        step = _LaunchedStep(plan, launched_at=self._clock())
        failures = self._run(plan.lane, plan.jobs)
        if failures is None:
            self._finish_steps(0)
            self._scheduler.charge(plan.lane, self._seconds_since_last(step))
            self._shrink(plan)
            return True
        self._scheduler.row_limit.count_good_step()
        self._launched.append(step)
        self._postprocess(plan, failures)
        step.previews = self._reports.previews(plan, self._runners[plan.lane])
        step.done = self._runners[plan.lane].launched()
        # A part of a warm-up waits for the device anyway, and its time is not the step's.
        self._finish_steps(0 if self._warm_ups else self._steps_ahead)
        self._reports.report_queue()
        self._warm_up_further()
        return True

    def _finish_steps(self, num_ahead: int) -> bool:
        """Wait until the device has at most so many steps to do, and act on those that it has done; False
        where it had no more.
        """
        if len(self._launched) <= num_ahead:
            return False
        while len(self._launched) > num_ahead:
            step = self._launched.popleft()
            if step.done is not None:
                step.done.synchronize()
            seconds = self._seconds_since_last(step)
            self._scheduler.charge(step.plan.lane, seconds)
            self._observe(step.plan, seconds)
            for latents in step.finished:
                self._submit(latents)
            self._reports.report_steps(step.plan, step.previews)
        return True

    def _seconds_since_last(self, step: _LaunchedStep) -> float:
        """What a step that ends now took, without the time of those before it, which is theirs."""
        now = self._clock()
        seconds = now - max(step.launched_at, self._last_step_ended_at)
        self._last_step_ended_at = now
        return seconds

    def _run_forever(self) -> None:
        try:
            make_current(self.device)
            self._warm_up_all()
            self._warm.set()
            while not self._stopping:
                if not self.step():
                    self._wait()
        except BaseException as error:  # the thread's last words: everyone who waits gets an answer
            self._die(error)
        finally:
            self._warm.set()

    def _warm_up_all(self) -> None:
        for runner in self._runners.values():
            runner.warm_up(decode_batch=self._decoder.max_batch)

    def _warm_up(self, lane: LaneName, pipeline: ServedPipeline) -> Iterator[None]:
        """Warm a lane up, a part each `next`; it is served from the end on."""
        runner = Runner(pipeline, num_slots=self._scheduler.max_rows)
        yield from runner.warm_up_in_parts(decode_batch=self._decoder.max_batch)
        self._scheduler.add_lane(lane)
        self._runners[lane] = runner

    def _warm_up_further(self) -> bool:
        """A part of the warm-up of the next lane to come; False where none is to come."""
        if not self._warm_ups:
            return False
        parts, joined = self._warm_ups[0]
        try:
            next(parts)
        except torch.AcceleratorError:
            raise
        except StopIteration:
            self._settle(joined, None)
        except Exception as error:  # whatever a broken model or a full device makes libraries raise
            self._settle(joined, error)
        return True

    def _settle(self, joined: Future[None], error: Exception | None) -> None:
        self._warm_ups.popleft()
        with self._changed:
            self._joining.discard(joined)
        with contextlib.suppress(InvalidStateError):  # the decoder has died meanwhile, and failed it
            if error is None:
                joined.set_result(None)
            else:
                joined.set_exception(error)

    def _forget_lanes(self) -> None:
        """Let the models go that are served no longer and have made their last image."""
        if any(step.plan.lane in self._retired for step in self._launched):
            self._finish_steps(0)
        for lane in [lane for lane in self._retired if self._scheduler.remove_lane(lane)]:
            self._retired.discard(lane)
            self._runners.pop(lane, None)

    def _receive(self) -> None:
        while not self._inbox.empty():
            self._inbox.get()()

    def _wait(self) -> None:
        """Sleep until there is a command, which is run, a deadline has come, or a batch is to begin."""
        timeout_s = None
        wake_at = min(self._next_deadline, self._scheduler.opens_at)
        if wake_at < math.inf:
            timeout_s = min(max(0.0, wake_at - self._clock()), threading.TIMEOUT_MAX)
        with contextlib.suppress(queue.Empty):
            self._inbox.get(timeout=timeout_s)()

    def _accept(self, ticket: Ticket) -> None:
        self._scheduler.add(ticket)
        self._reports.add(ticket)
        if ticket.deadline < math.inf:
            self._timed.add(ticket)
            self._next_deadline = min(self._next_deadline, ticket.deadline)

    def _expire(self) -> None:
        """Give up the requests whose time is over, before they cost another step."""
        now = self._clock() if self._timed else -math.inf
        if now < self._next_deadline:
            return
        for ticket in [ticket for ticket in self._timed if ticket.deadline <= now]:
            self._time_out(ticket, now)
        self._next_deadline = min((ticket.deadline for ticket in self._timed), default=math.inf)

    def _time_out(self, ticket: Ticket, now: float) -> None:
        request = ticket.request
        stage = ticket.stage
        started_at = now if ticket.started_at is None else ticket.started_at
        error = DeadlineExceeded(
            ticket.deadline - ticket.submitted_at,
            queue_s=started_at - ticket.submitted_at,
            steps_done=ticket.steps_done,
            steps=request.num_images * request.num_inference_steps,
        )
        if self._gives_up(ticket) and ticket.fail(error):  # else it was answered in this moment
            _logger.info("%s", error, extra={"request_id": request.request_id})
            self._metrics.deadlines_exceeded.labels(stage).inc()
            self._metrics.request_success.labels("timeout").inc()
            self._close(ticket)
        self._drop(ticket)

    def _note_start(self, plan: PlannedStep) -> None:
        self._leave_queue(len(plan.admitted))
        for job in plan.admitted:
            ticket = job.ticket
            if ticket.started_at is None:
                ticket.started_at = self._clock()
                self._metrics.request_queue_time.observe(ticket.started_at - ticket.submitted_at)
                self._reports.forget(ticket)

    def _run(self, lane: LaneName, jobs: Sequence[ImageJob]) -> dict[ImageJob, Exception] | None:
        """Run the step; where it raises, run its images one by one, so that only the culprit fails.

        None where the device has no memory for all of them: none has moved, and fewer may fit.
        """
        try:
            self._runners[lane].step(jobs)
        except torch.AcceleratorError:  # after it every call on the device fails: only a restart helps
            raise
        except torch.OutOfMemoryError as error:
            return {jobs[0]: error} if len(jobs) == 1 else None
        except Exception as error:  # whatever one image's step raises is that image's failure alone
            if len(jobs) == 1:
                return {jobs[0]: error}
            _logger.warning("a step of %d images failed (%s); running them singly", len(jobs), error)
        else:
            return {}
        failures: dict[ImageJob, Exception] = {}
        for job in jobs:
            failures |= self._run(lane, (job,)) or {}
        return failures

    def _shrink(self, plan: PlannedStep) -> None:
        """Go on with fewer rows a step; the images of this one take it again, not all at once."""
        limit = self._scheduler.row_limit
        limit.shrink(plan.num_rows)
        # Not before: the error that said so holds what the network had made until then.
        self._runners[plan.lane].free_memory()
        self._metrics.out_of_memory_recoveries.labels(self.device).inc()
        _logger.warning(
            "no memory on %s for a step of %d rows; a step has at most %d now",
            *(self.device, plan.num_rows, limit.value),
        )

    def _postprocess(self, plan: PlannedStep, failures: Mapping[ImageJob, Exception]) -> None:
        for job, error in failures.items():
            self._fail(job.ticket, error, stage="denoise")
            self._drop(job.ticket)
        for job in plan.jobs:
            if job.slot is not None:  # not dropped with a failed image of the same request
                job.step_index += 1
        self._hand_over(plan.lane)

    def _hand_over(self, lane: LaneName) -> None:
        """Give the finished images that leave the lane to the decoder, once the device has made them."""
        leaving = self._scheduler.leaving(lane)
        if not leaving:
            return
        latents = self._runners[lane].take(leaving)
        for job in leaving:
            self._scheduler.release(job)
        if self._launched:
            self._launched[-1].finished.append(latents)
        else:
            self._submit(latents)

    def _submit(self, latents: FinishedLatents) -> None:
        for job in latents.jobs:
            job.ticket.denoised_at = self._clock()
        self._decoder.submit(latents)

    def _drop(self, ticket: Ticket) -> None:
        self._timed.discard(ticket)
        self._reports.forget(ticket)
        num_queued = self._scheduler.drop(ticket)
        self._leave_queue(num_queued)

    def _leave_queue(self, num_images: int) -> None:
        with self._changed:  # where the decoder has died since, all were taken out together
            self._num_waiting_images = max(0, self._num_waiting_images - num_images)

    # --- the decoder's thread: DecoderListener ---

    def backlog_shrunk(self) -> None:
        """Wake the engine, which may wait for the decoder to catch up."""
        self._inbox.put(_nothing)

    def image_decoded(self, job: ImageJob, pixels: NDArray[np.uint8]) -> None:
        """Hand the image to whoever waits for it; the last one of a request closes the request."""
        job.ticket.decoded_at = self._clock()
        with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
            job.result.set_result(pixels)
        if job.ticket.done:
            self._close(job.ticket)

    def image_failed(self, job: ImageJob, error: Exception) -> None:
        """Answer the request with its failure and give its other images up."""
        self._fail(job.ticket, error, stage="decode")

    def decoder_stopped(self, error: BaseException | None) -> None:
        """Without a decoder the engine is of no use."""
        if error is not None:
            self._die(error)

    # --- every thread ---

    def _count_image(self, ticket: Ticket, result: Future[NDArray[np.uint8]]) -> None:
        if result.cancelled() or result.exception() is not None:
            return
        self._metrics.count_image()
        if ticket.made:  # only the decoder's thread gives results, so this is the last one
            self._metrics.request_success.labels("stop").inc()

    def _guided_steps(self, request: GenerationRequest) -> range:
        schedule = self._runners[request.lane].pipeline.schedule
        table = sampler_table(request.sampler, request.num_inference_steps, schedule)
        return guided_steps(table.timesteps.tolist(), request.guidance_scale, request.guidance_interval)

    def _fail(self, ticket: Ticket, error: Exception, *, stage: str) -> None:
        answer = GenerationFailed(f"{stage}: failed for this request; the server's log has the reason")
        if not self._gives_up(ticket) or not ticket.fail(answer):  # answered already, or in this moment
            return
        request_id = ticket.request.request_id
        _logger.error("%s failed", stage, exc_info=error, extra={"request_id": request_id})
        self._metrics.failures.labels(stage).inc()
        self._metrics.request_success.labels("error").inc()
        self._close(ticket)

    def _gives_up(self, ticket: Ticket) -> bool:
        """Whether it is for the caller to cancel a request or to fail it, and to count that.

        It is for the first one alone: the images of a request are given up one by one, and after the first of
        them its client may leave, which would have another thread cancel the others.
        """
        with self._changed:
            first, ticket.given_up = not ticket.given_up, True
        return first

    def _close(self, ticket: Ticket) -> None:
        """The request is answered: nobody waits for it, and what is left of it in queue and slots goes."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._open_rows -= ticket.num_rows
            self._changed.notify_all()
        self._inbox.put(partial(self._drop, ticket))

    def _die(self, error: BaseException) -> None:
        _logger.critical("the engine has stopped", exc_info=error)
        with self._changed:
            first, self._failure = self._failure is None, error
        self._stopping = True
        self._inbox.put(_nothing)
        self._fail_joining(EngineStopped(_STOPPED))
        if self.on_death is None:
            self._fail_all(EngineStopped(_STOPPED))
        elif first:
            self.on_death()

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineStopped(_STOPPED)

    def _enqueue(self, ticket: Ticket) -> None:
        """Hand a request to the engine's thread; `_changed` is held."""
        self._num_waiting_images += len(ticket.unmade)
        self._open_rows += ticket.num_rows
        self._tickets.add(ticket)
        self._inbox.put(partial(self._accept, ticket))

    def _fail_all(self, error: Exception) -> None:
        for ticket in self._take_tickets():
            if self._gives_up(ticket) and ticket.fail(error):
                self._metrics.request_success.labels("error").inc()

    def _fail_joining(self, error: Exception) -> None:
        with self._changed:
            joining, self._joining = self._joining, set()
        for joined in joining:
            with contextlib.suppress(InvalidStateError):  # warm in this moment
                joined.set_exception(error)

    def _take_tickets(self) -> set[Ticket]:
        """All requests without an answer, for which this engine answers no longer."""
        with self._changed:
            tickets, self._tickets = self._tickets, set()
            self._open_rows = self._num_waiting_images = 0
            self._changed.notify_all()
        return tickets

    def _num_requests(self, *, started: bool) -> int:
        with self._changed:
            return sum((ticket.started_at is not None) is started for ticket in self._tickets)

    def _observe(self, plan: PlannedStep, seconds: float) -> None:
        num_images, rows = len(plan.jobs), plan.num_rows
        self._metrics.count_step(
            seconds=seconds,
            rows=rows,
            computed_rows=self._runners[plan.lane].pipeline.num_rows(num_images, rows - num_images),
            max_rows=self._scheduler.max_rows,
        )


def _nothing() -> None:
    """A command that only wakes the engine's thread."""
