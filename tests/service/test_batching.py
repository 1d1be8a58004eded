"""service/engine/batching.py: if this fails, comparisons are with a baseline that is not one.

What continuous batching does is in test_scheduler.py and test_engine.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from model.pipeline import LaMambaPipeline
from service.engine.batching import StaticBatching
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, LaneName, Ticket
from service.engine.scheduler import Scheduler
from service.metrics import Metrics
from service.runtime import Runtime
from service.settings import Settings
from tests.fakes import fake_pipeline

WAIT_S = 0.5
TIMEOUT_S = 30.0


def request(steps: int = 4, *, num_images: int = 1, guidance_scale: float = 2.0) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        model="fake-16",
        class_label=0,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        sampler="ddim",
        seed=0,
        num_images=num_images,
    )


def static_scheduler(max_images: int = 3, *, max_rows: int = 8) -> Scheduler:
    return Scheduler(
        [LaneName("fake-16")],
        max_rows=max_rows,
        batching=StaticBatching(max_images=max_images, wait_s=WAIT_S),
    )


def static_engine(pipeline: LaMambaPipeline, *, max_images: int, wait_s: float) -> Engine:
    return Engine(
        {LaneName(pipeline.name): pipeline},
        max_rows=8,
        max_queue_images=64,
        metrics=Metrics(),
        batching=StaticBatching(max_images=max_images, wait_s=wait_s),
    )


def add(scheduler: Scheduler, *, at: float, **arguments: Any) -> Ticket:
    ticket = Ticket(request(**arguments), submitted_at=at)
    scheduler.add(ticket)
    return ticket


def test_a_batch_begins_when_its_first_image_has_waited() -> None:
    scheduler = static_scheduler()
    add(scheduler, at=10.0)
    add(scheduler, at=10.25)
    assert scheduler.schedule(10.25) is None
    assert scheduler.opens_at == 10.5
    plan = scheduler.schedule(10.5)
    assert plan is not None
    assert len(plan.jobs) == 2


def test_a_full_batch_begins_at_once_and_takes_no_more_than_its_size() -> None:
    scheduler = static_scheduler()
    add(scheduler, at=10.0, num_images=5)
    plan = scheduler.schedule(10.0)
    assert plan is not None
    assert len(plan.jobs) == 3
    assert scheduler.num_waiting == 2


def test_a_batch_keeps_to_the_rows() -> None:
    scheduler = static_scheduler(max_images=4, max_rows=5)
    add(scheduler, at=0.0, num_images=4)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert plan.num_rows == 4


def test_nobody_joins_and_nobody_leaves_before_the_end() -> None:
    scheduler = static_scheduler()
    short, long = add(scheduler, at=0.0, steps=1), add(scheduler, at=0.0, steps=3)
    rows: list[int] = []
    for step in range(3):
        plan = scheduler.schedule(WAIT_S)
        assert plan is not None
        rows.append(plan.num_rows)
        for job in plan.jobs:
            job.step_index += 1
        leaving = {job.ticket for job in scheduler.leaving(LaneName("fake-16"))}
        assert leaving == ({short, long} if step == 2 else set())
        add(scheduler, at=0.0)
    assert rows == [4, 2, 2]  # the finished image costs nothing more


def test_who_came_during_a_batch_begins_with_the_next_without_waiting_again() -> None:
    scheduler = static_scheduler()
    first = add(scheduler, at=0.0)
    scheduler.schedule(1.0)
    late = add(scheduler, at=1.1)
    scheduler.release(first.jobs[0])
    plan = scheduler.schedule(2.0)
    assert plan is not None
    assert [job.ticket for job in plan.jobs] == [late]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_images": 0, "wait_s": 0.0}, "batch_size: 0 given"),
        ({"max_images": 1, "wait_s": -1.0}, "batch_wait: -1.0 s given"),
        ({"max_images": 1, "wait_s": float("nan")}, "batch_wait: nan s given"),
    ],
    ids=["size", "negative", "nan"],
)
def test_static_batching_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticBatching(**arguments)


def test_engine_answers_a_static_batch_together_and_only_then_begins_the_next() -> None:
    pipeline = fake_pipeline()
    engine = static_engine(pipeline, max_images=2, wait_s=0.0)
    tickets = [engine.submit(request(steps)) for steps in (2, 5, 3)]
    while engine.step():
        pass
    network: Any = pipeline.network
    assert network.rows_of_calls == [4, 4, 2, 2, 2, 2, 2, 2]
    denoised = [ticket.denoised_at for ticket in tickets]
    started = [ticket.started_at for ticket in tickets]
    assert None not in [*denoised, *started]
    assert max(denoised[:2]) <= started[2]  # type: ignore[type-var, operator]
    engine.stop()


def test_engine_a_batch_that_waits_for_one_given_up_is_answered() -> None:
    pipeline = fake_pipeline()
    engine = static_engine(pipeline, max_images=2, wait_s=0.0)
    short, endless = engine.submit(request(1)), engine.submit(request(1000))
    engine.step()
    engine.cancel(endless)
    assert not engine.step()
    assert short.denoised_at is not None
    engine.stop()


def test_engine_that_sleeps_begins_a_batch_when_its_time_has_come() -> None:
    """No command wakes the thread: it has to wake by itself."""
    pipeline = fake_pipeline()
    engine = static_engine(pipeline, max_images=4, wait_s=0.02)
    engine.start()
    try:
        ticket = engine.submit(request(1))
        assert ticket.jobs[0].result.result(TIMEOUT_S).shape == (16, 16, 3)
        assert ticket.stage_seconds["queue"] >= 0.02
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("settings", "failure"),
    [
        ({"max_rows": 8}, None),
        ({"max_rows": 8, "batch_size": 8}, None),
        ({"max_rows": 8, "batch_size": 9}, "batch_size: 9 given; with max_rows 8, 1 to 8"),
    ],
    ids=["default", "most", "too-many"],
)
def test_settings_choose_the_policy(settings: dict[str, int], failure: str | None) -> None:
    runtime = Runtime(Settings(batching="static", **settings), (fake_pipeline(),))

    async def start() -> None:
        await runtime.start()
        await runtime.stop()

    asyncio.run(start())
    assert (str(runtime.failure) if runtime.failure else None) == failure
