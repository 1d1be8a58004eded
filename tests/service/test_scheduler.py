"""service/engine/scheduler.py: if this fails, requests starve, slots leak, or a step is too large."""

from __future__ import annotations

import random

import pytest

from service.engine.request import PRIORITIES, GenerationRequest, LaneName, Priority, Ticket
from service.engine.scheduler import PlannedStep, Scheduler

A, B = LaneName("a"), LaneName("b")


def ticket(
    model: str = "a",
    *,
    num_images: int = 1,
    guided: bool = True,
    steps: int = 4,
    priority: Priority = "normal",
    at: float = 0.0,
    guided_steps: range | None = None,
) -> Ticket:
    return Ticket(
        GenerationRequest(
            request_id="r",
            model=model,
            class_label=0,
            guidance_scale=2.0 if guided else 1.0,
            num_inference_steps=steps,
            sampler="ddim",
            seed=0,
            num_images=num_images,
            priority=priority,
        ),
        submitted_at=at,
        guided_steps=guided_steps,
    )


def run(scheduler: Scheduler, cost_s: float = 1.0) -> PlannedStep | None:
    """One step as the engine takes it: advance, release what is finished, charge."""
    plan = scheduler.schedule(0.0)
    if plan is not None:
        for job in plan.jobs:
            job.step_index += 1
            if job.finished:
                scheduler.release(job)
        scheduler.charge(plan.lane, cost_s)
    return plan


def test_schedule_packs_rows_up_to_the_budget() -> None:
    scheduler = Scheduler([A], max_rows=5)
    guided, unguided = ticket(num_images=2), ticket(num_images=3, guided=False)
    scheduler.add(guided)
    scheduler.add(unguided)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert plan.num_rows == 5
    assert [job.ticket for job in plan.jobs] == [guided, unguided, guided]
    assert scheduler.num_waiting == 2


def test_schedule_does_not_let_a_small_image_overtake_one_that_does_not_fit() -> None:
    scheduler = Scheduler([A], max_rows=3)
    first, large, small = ticket(steps=2), ticket(steps=2), ticket(guided=False, steps=2)
    for waiting in (first, large, small):
        scheduler.add(waiting)
    plans = [run(scheduler) for _ in range(4)]
    assert [[job.ticket for job in plan.jobs] for plan in plans if plan] == [
        [first],
        [first],
        [large, small],
        [large, small],
    ]


def test_schedule_an_image_outside_of_its_guidance_interval_takes_one_row() -> None:
    scheduler = Scheduler([A], max_rows=4)
    waiting = ticket(num_images=4, steps=3, guided_steps=range(1, 2))
    scheduler.add(waiting)
    assert waiting.num_rows == 4 * (1 + 2 + 1)
    rows = [(plan.num_rows, len(plan.jobs)) for plan in iter(lambda: run(scheduler), None)]
    assert rows[0] == (4, 4)
    assert sum(num_rows for num_rows, _ in rows) == 4 * (1 + 2 + 1)
    assert sum(num_images for _, num_images in rows) == 4 * 3
    assert len(rows) == 4  # none of them a row short


def test_schedule_images_that_do_not_fit_a_step_together_take_turns() -> None:
    """All come into their intervals at once: each is left out no more often than it must be."""
    scheduler = Scheduler([A], max_rows=4)
    crowd = ticket(num_images=4, steps=9, guided_steps=range(1, 9))
    scheduler.add(crowd)
    run(scheduler)
    for _ in range(8):
        plan = run(scheduler)
        assert plan is not None
        assert (plan.num_rows, plan.admitted) == (4, ())
        done = [job.step_index for job in crowd.jobs]
        assert max(done) - min(done) <= 1


def test_schedule_gives_slots_to_requests_in_turn() -> None:
    scheduler = Scheduler([A], max_rows=4)
    crowd, single = ticket(num_images=16, steps=1), ticket(steps=1)
    scheduler.add(crowd)
    scheduler.add(single)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert {job.ticket for job in plan.jobs} == {crowd, single}


def test_schedule_admits_by_priority_and_within_one_by_arrival() -> None:
    scheduler = Scheduler([A], max_rows=2)
    running = ticket(steps=1, num_images=1)
    scheduler.add(running)
    run(scheduler)
    waiting = {
        (priority, at): ticket(steps=1, priority=priority, at=at)
        for at, priority in enumerate([*reversed(PRIORITIES), *PRIORITIES])
    }
    for one in waiting.values():
        scheduler.add(one)
    names = {one: key for key, one in waiting.items()}
    order = [names[plan.jobs[0].ticket] for plan in iter(lambda: run(scheduler), None)]
    assert order == [("high", 2), ("high", 3), ("normal", 1), ("normal", 4), ("low", 0), ("low", 5)]


def test_schedule_a_high_crowd_takes_slots_before_a_normal_one_and_leaves_it_the_rest() -> None:
    scheduler = Scheduler([A], max_rows=6)
    normal, high = ticket(num_images=4), ticket(num_images=2, priority="high", at=1.0)
    scheduler.add(normal)
    scheduler.add(high)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert [job.ticket for job in plan.jobs] == [high, high, normal]


@pytest.mark.parametrize(("priority", "bound_s"), [("low", 20.0), ("normal", 10.0)])
def test_schedule_an_endless_stream_of_high_requests_starves_nobody(
    priority: Priority, bound_s: float
) -> None:
    """Twice as many high requests as the lane can take: the other one still waits no longer than it ages."""
    scheduler = Scheduler([A], max_rows=2, aging_s=10.0)
    patient = ticket(steps=1, priority=priority, at=5.0)
    backlog = 0
    for second in range(200):
        if second == 5:
            scheduler.add(patient)
            backlog = scheduler.num_waiting - 1
        scheduler.add(ticket(steps=1, priority="high", at=float(second)))
        scheduler.add(ticket(steps=1, priority="high", at=float(second)))
        plan = run(scheduler)
        assert plan is not None
        if plan.jobs[0].ticket is patient:
            # Whoever was there before it, or came while it aged, has gone first, two a second; nobody else.
            overtaking = backlog + 2 * (bound_s + 1)
            assert bound_s <= second - 5 <= overtaking
            break
    else:
        pytest.fail("starved")


def test_schedule_priorities_do_not_change_the_turns_of_the_lanes() -> None:
    scheduler = Scheduler([A, B], max_rows=2)
    scheduler.add(ticket("a", steps=100, priority="low"))
    scheduler.add(ticket("b", steps=100, priority="high"))
    lanes = [plan.lane for plan in (run(scheduler) for _ in range(20)) if plan]
    assert lanes.count(A) == 10


def test_schedule_joins_new_images_at_the_next_step() -> None:
    scheduler = Scheduler([A], max_rows=8)
    early, late = ticket(steps=3), ticket(steps=3)
    scheduler.add(early)
    run(scheduler)
    scheduler.add(late)
    plan = run(scheduler)
    assert plan is not None
    assert {job.ticket for job in plan.jobs} == {early, late}


def test_schedule_admits_nobody_when_told_so() -> None:
    scheduler = Scheduler([A], max_rows=4)
    scheduler.add(ticket())
    assert scheduler.schedule(0.0, admit=False) is None
    assert scheduler.num_waiting == 1
    assert scheduler.schedule(0.0) is not None


def test_lanes_share_time_whatever_their_steps_cost() -> None:
    scheduler = Scheduler([LaneName("cheap"), LaneName("dear")], max_rows=2)
    scheduler.add(ticket("cheap", steps=1000))
    scheduler.add(ticket("dear", steps=1000))
    used = {"cheap": 0.0, "dear": 0.0}
    for _ in range(500):
        plan = scheduler.schedule(0.0)
        assert plan is not None
        cost_s = 4.0 if plan.lane.model == "dear" else 1.0
        used[plan.lane.model] += cost_s
        scheduler.charge(plan.lane, cost_s)
        assert abs(used["cheap"] - used["dear"]) <= 4.0


def test_a_lane_gets_no_credit_for_having_been_idle() -> None:
    scheduler = Scheduler([A, B], max_rows=2)
    scheduler.add(ticket("a", steps=1000))
    for _ in range(500):
        run(scheduler)
    scheduler.add(ticket("b", steps=100))
    lanes = [plan.lane for plan in (run(scheduler) for _ in range(20)) if plan]
    assert lanes.count(A) in (9, 10)


def test_a_lane_that_worked_alone_is_not_punished_for_it() -> None:
    scheduler = Scheduler([A, B], max_rows=2)
    scheduler.add(ticket("a", steps=500))
    while run(scheduler):
        pass
    scheduler.add(ticket("b", steps=100))
    scheduler.add(ticket("a", steps=100))
    lanes = [plan.lane for plan in (run(scheduler) for _ in range(20)) if plan]
    assert lanes.count(A) in (9, 10)


def test_drop_frees_slots_and_queue_places_once() -> None:
    scheduler = Scheduler([A], max_rows=4)
    dropped, other = ticket(num_images=5), ticket()
    scheduler.add(dropped)
    scheduler.add(other)
    scheduler.schedule(0.0)
    assert scheduler.drop(dropped) == 4
    assert scheduler.drop(dropped) == 0
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert [job.ticket for job in plan.jobs] == [other]


def test_max_rows_below_a_guided_image_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_rows: 1 given"):
        Scheduler([A], max_rows=1)


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_leaks_no_slot_and_finishes_every_request(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler([A, B], max_rows=6)
    tickets: list[Ticket] = []
    dropped: set[Ticket] = set()
    for step in range(120):
        if rng.random() < 0.4:
            tickets.append(
                ticket(
                    rng.choice("ab"),
                    num_images=rng.randint(1, 5),
                    guided=rng.random() < 0.6,
                    steps=rng.randint(1, 5),
                    priority=rng.choice(PRIORITIES),
                    at=float(step),
                    guided_steps=rng.choice((None, range(0), range(1, 3), range(2))),
                )
            )
            scheduler.add(tickets[-1])
        if tickets and rng.random() < 0.1:
            gone = rng.choice(tickets)
            scheduler.drop(gone)
            dropped.add(gone)
        plan = run(scheduler, cost_s=rng.random())
        if plan is not None:
            assert plan.num_rows <= 6
            assert not dropped & {job.ticket for job in plan.jobs}
    for _ in range(2000):
        if run(scheduler) is None:
            break
    assert scheduler.num_active == scheduler.num_waiting == 0
    assert all(job.finished for t in tickets if t not in dropped for job in t.jobs)
    assert all(job.slot is None for t in tickets for job in t.jobs)
