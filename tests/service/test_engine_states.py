"""The engine under any order of events: if this fails, requests are lost, answered twice, or never.

A state machine submits, cancels, breaks, decodes, swaps models and lets time pass in whatever order
hypothesis finds worst, and checks after each event what must always hold. No thread runs and no clock ticks:
the test takes the steps of the engine and of the decoder itself, and time passes when it says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client.parser import text_string_to_metric_families

import service.engine.engine
from service.engine.batching import CONTINUOUS, Batching, StaticBatching
from service.engine.decode import Decoder
from service.engine.engine import Engine
from service.engine.request import PRIORITIES, GenerationRequest, ImageJob, LaneName, Priority, Ticket
from service.errors import DeadlineExceeded, Draining, GenerationFailed, QueueFull
from service.metrics import Metrics
from tests.fakes import fake_pipeline

MAX_ROWS = 5
MAX_QUEUE_IMAGES = 12
AGING_S = 4.0
STEP_S = 1 / 64  # exact in binary, as are all other times: deadlines are met to the tick
FAULTY = 4  # the class whose images fail while the network is broken
LANES = ("a", "b")
STATIC = StaticBatching(max_images=3, wait_s=0.25)


class SteppedDecoder(Decoder):
    """A decoder whose thread is the test's."""

    def start(self) -> None:
        pass

    def decode_batch(self) -> None:
        if self._pending or not self._inbox.empty():
            self._decode(self._next_batch())


class EngineMachine(RuleBasedStateMachine):
    """An engine of two models and the requests that it was given."""

    batching: Batching = CONTINUOUS

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.metrics = Metrics()
        pipelines = {LaneName(name): fake_pipeline(name) for name in LANES}
        self.versions = dict.fromkeys(LANES, 1)
        self.networks: list[Any] = [pipeline.network for pipeline in pipelines.values()]
        for network in self.networks:
            network.before_call = self.pass_step_time
        with patch.object(service.engine.engine, "Decoder", SteppedDecoder):
            self.engine = Engine(
                pipelines,
                max_rows=MAX_ROWS,
                max_queue_images=MAX_QUEUE_IMAGES,
                metrics=self.metrics,
                priority_aging_s=AGING_S,
                batching=self.batching,
                clock=lambda: self.now,
            )
        self.scheduler = self.engine._scheduler
        self.tickets: list[Ticket] = []
        self.cancelled: set[Ticket] = set()
        self.unseen_images = 0
        """Images submitted since the engine last looked into its inbox."""
        self.answers: dict[ImageJob, int] = {}
        self.image_may_not_fit = False
        """Whether there was memory for one row alone at some time."""

    def pass_step_time(self) -> None:
        self.now += STEP_S

    # --- events ---

    @initialize(broken=st.booleans(), steps_ahead=st.sampled_from([0, 1]))
    def set_up(self, broken: bool, steps_ahead: int) -> None:
        self.break_or_mend(broken)
        self.engine._steps_ahead = steps_ahead  # 1: what follows from a step comes one later, as on a GPU

    @rule(
        model=st.sampled_from(LANES),
        num_images=st.integers(1, 6),
        guidance_scale=st.sampled_from([1.0, 2.5]),
        guidance_interval=st.none() | st.sampled_from([(0, 400), (300, 700), (600, 999)]),
        steps=st.integers(1, 6),
        sampler=st.sampled_from(["ddim", "ddpm"]),
        class_label=st.integers(0, FAULTY),
        priority=st.sampled_from(PRIORITIES),
        timeout_s=st.none() | st.sampled_from([STEP_S, 4 * STEP_S, 1.0, 8.0]),
    )
    def submit(
        self,
        model: str,
        num_images: int,
        guidance_scale: float,
        guidance_interval: tuple[int, int] | None,
        steps: int,
        sampler: str,
        class_label: int,
        priority: Priority,
        timeout_s: float | None,
    ) -> None:
        request = GenerationRequest(
            request_id=f"r{len(self.tickets)}",
            model=model,
            class_label=class_label,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_inference_steps=steps,
            sampler=sampler,
            seed=len(self.tickets),
            num_images=num_images,
            priority=priority,
            timeout_s=timeout_s,
            version=self.versions[model],
        )
        waiting = self.waiting_images()
        try:
            ticket = self.engine.submit(request)
        except QueueFull:
            assert waiting + num_images > MAX_QUEUE_IMAGES
            return
        except Draining:
            assert self.engine.draining
            return
        assert waiting + num_images <= MAX_QUEUE_IMAGES
        self.unseen_images += num_images
        self.tickets.append(ticket)
        for job in ticket.jobs:
            self.answers[job] = 0
            job.result.add_done_callback(lambda _, job=job: self.count_answer(job))  # type: ignore[misc]

    def count_answer(self, job: ImageJob) -> None:
        self.answers[job] += 1

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        if not ticket.done:
            self.cancelled.add(ticket)
        self.engine.cancel(ticket)
        assert ticket.done

    @rule(seconds=st.sampled_from([STEP_S, 0.5, 2.0, AGING_S, 3 * AGING_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(broken=st.booleans())
    def break_or_mend(self, broken: bool) -> None:
        for network in self.networks:
            network.failing_label = FAULTY if broken else None

    @rule(rows=st.none() | st.integers(1, MAX_ROWS))
    def take_or_give_memory(self, rows: int | None) -> None:
        for network in self.networks:
            network.rows_that_fit = rows
        self.image_may_not_fit |= rows == 1

    @rule(model=st.sampled_from(LANES))
    def swap(self, model: str) -> None:
        old = LaneName(model, self.versions[model])
        new = fake_pipeline(model)
        joined = self.engine.add_lane(LaneName(model, old.version + 1), new)
        while not joined.done():
            assert self.take_step()
        joined.result(0)
        network: Any = new.network
        network.before_call = self.pass_step_time
        network.failing_label = self.networks[0].failing_label
        network.rows_that_fit = self.networks[0].rows_that_fit
        self.networks.append(network)
        self.versions[model] += 1
        self.engine.remove_lane(old)

    @rule()
    def step(self) -> None:
        self.take_step()

    @rule(count=st.integers(2, 8))
    def several_steps(self, count: int) -> None:
        for _ in range(count):
            self.take_step()
            self.decode()

    @rule()
    def decode(self) -> None:
        self.decoder.decode_batch()

    @rule()
    def drain(self) -> None:
        if len(self.tickets) > 10:  # else most runs would be over before they begin
            self.engine.drain()

    # --- what must hold ---

    @property
    def decoder(self) -> SteppedDecoder:
        decoder = self.engine._decoder
        assert isinstance(decoder, SteppedDecoder)
        return decoder

    def take_step(self) -> bool:
        """One step of the engine, which must be one that it may take."""
        began = self.now
        unstarted = [ticket for ticket in self.tickets if ticket.started_at is None]
        steps_before = {ticket: ticket.steps_done for ticket in self.tickets}
        open_before = [ticket for ticket in self.tickets if not ticket.done]
        worked = self.engine.step()
        self.unseen_images = 0
        for ticket in self.tickets:
            advanced = ticket.steps_done > steps_before[ticket]
            assert not advanced or (ticket in open_before and ticket.deadline > began)
            assert ticket.done or ticket.deadline > began
        admitted = [ticket for ticket in unstarted if ticket.started_at is not None]
        passed_over = [
            ticket
            for ticket in unstarted
            if ticket.started_at is None and not ticket.done and ticket.deadline > began
        ]
        for ticket in admitted:
            for other in passed_over:
                if ticket.request.lane == other.request.lane:
                    assert counts_as_submitted(ticket) <= counts_as_submitted(other)
        return worked

    def waiting_images(self) -> int:
        return self.engine._num_waiting_images

    @invariant()
    def waiting_images_are_counted(self) -> None:
        assert 0 <= self.waiting_images() <= MAX_QUEUE_IMAGES
        assert self.waiting_images() == self.scheduler.num_waiting + self.unseen_images

    @invariant()
    def slots_are_free_or_held_by_one_image(self) -> None:
        for lane in self.scheduler._lanes.values():
            assert sorted([*lane.free_slots, *lane.active]) == list(range(MAX_ROWS))
            assert all(job.slot == slot for slot, job in lane.active.items())
            assert not lane.active or not all(job.finished for job in lane.active.values())

    @invariant()
    def a_step_may_always_have_a_row(self) -> None:
        assert 1 <= self.scheduler.row_limit.value <= MAX_ROWS

    @invariant()
    def steps_keep_to_the_budget(self) -> None:
        assert all(rows <= MAX_ROWS for network in self.networks for rows in network.rows_of_calls)

    @invariant()
    def whoever_is_not_answered_is_known_to_the_engine(self) -> None:
        assert self.engine._tickets == {ticket for ticket in self.tickets if not ticket.done}
        assert all(count == job.result.done() for job, count in self.answers.items())

    def teardown(self) -> None:
        """Finish what was accepted, in no more steps than there is work for engine and decoder, which the
        engine waits for; then look at every answer.

        Where the engine waits for a batch to fill, its time passes.
        """
        left = sum(
            ticket.request.num_images * ticket.request.num_inference_steps - ticket.steps_done
            for ticket in self.tickets
            if not ticket.done
        )
        halvings = len(LANES) * MAX_ROWS  # of the limit of rows, which may stand above what fits
        last = 1 + self.engine._steps_ahead
        for _ in range(left + last + self.decoder.backlog + halvings):
            if not self.take_step() and self.scheduler.opens_at < math.inf:
                self.now = self.scheduler.opens_at
                self.take_step()
            self.decode()
        self.engine.drain()
        for _ in range(self.decoder.backlog):
            self.decode()
        assert self.decoder.backlog == 0
        self.take_step()  # the last requests leave
        assert self.engine.idle
        assert self.waiting_images() == self.scheduler.num_waiting == self.scheduler.num_active == 0
        assert not self.engine._timed
        served = {LaneName(model, version) for model, version in self.versions.items()}
        assert self.engine._runners.keys() == self.scheduler._lanes.keys() == served
        self.engine.stop()
        assert set(self.answers.values()) <= {1}
        self.check_answers()

    def check_answers(self) -> None:
        outcomes = [self.outcome(ticket) for ticket in self.tickets]
        samples = {
            (sample.name, sample.labels.get("stage") or sample.labels.get("finished_reason")): sample.value
            for family in text_string_to_metric_families(self.metrics.render().decode())
            for sample in family.samples
        }

        def counted(name: str, *stages: str | None) -> float:
            return sum(samples[f"lamamba_{name}_total", stage] for stage in stages)

        assert counted("cancellations", None) == outcomes.count("cancelled")
        assert counted("failures", "denoise", "decode") == outcomes.count("failed")
        assert counted("deadline_exceeded", "queue", "denoise", "decode") == outcomes.count("late")
        for reason, outcome in (
            ("stop", "made"),
            ("abort", "cancelled"),
            ("error", "failed"),
            ("timeout", "late"),
        ):
            assert counted("request_success", reason) == outcomes.count(outcome)
        made = sum(
            not job.result.cancelled() and job.result.exception() is None
            for ticket in self.tickets
            for job in ticket.jobs
        )
        assert counted("images", None) == made

    def outcome(self, ticket: Ticket) -> str:
        """How a request ended, which has to be a way that it may end."""
        if any(job.result.cancelled() for job in ticket.jobs):
            assert ticket in self.cancelled
            return "cancelled"
        errors = {type(error) for job in ticket.jobs if (error := job.result.exception()) is not None}
        assert len(errors) <= 1
        if DeadlineExceeded in errors:
            assert ticket.deadline <= self.now
            return "late"
        if GenerationFailed in errors:
            assert ticket.request.class_label == FAULTY or (
                self.image_may_not_fit and ticket.request.guidance_scale > 1
            )
            return "failed"
        assert not errors
        assert ticket.stage_seconds
        return "made"


def counts_as_submitted(ticket: Ticket) -> float:
    """Who waits is overtaken only by those that count as submitted before it: so nobody waits for ever."""
    return ticket.submitted_at + AGING_S * PRIORITIES.index(ticket.request.priority)


class StaticEngineMachine(EngineMachine):
    """The same with static batches: closed when they begin, and answered together."""

    batching = STATIC

    def take_step(self) -> bool:
        began = self.now
        before = defaultdict(
            set, {name: set(lane.active.values()) for name, lane in self.scheduler._lanes.items()}
        )
        waiting = [
            job
            for ticket in self.tickets
            if not ticket.done and ticket.deadline > began
            for job in ticket.jobs
            if job.slot is None and job.step_index == 0
        ]
        worked = super().take_step()
        for name, lane in self.scheduler._lanes.items():
            batch = set(lane.active.values())
            if batch & before[name]:
                assert batch <= before[name]  # nobody has joined
                assert all(job.ticket.done for job in before[name] - batch)  # who left was given up
            elif batch:
                of_lane = [job.ticket for job in waiting if job.request.lane == name]
                waited_s = began - min(ticket.submitted_at for ticket in of_lane)
                assert len(batch) <= STATIC.max_images
                assert len(of_lane) >= STATIC.max_images or waited_s >= STATIC.wait_s
        return worked


TestEngineStates = EngineMachine.TestCase
TestStaticEngineStates = StaticEngineMachine.TestCase
# No loop: its variable would be collected as a third class.
TestEngineStates.settings = TestStaticEngineStates.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
