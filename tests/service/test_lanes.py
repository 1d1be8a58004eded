"""Models that join a running engine and leave it: if this fails, a swap loses requests, mixes two versions in
one image, or keeps the memory of what is served no longer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.pipeline import LaMambaPipeline
from service.engine.engine import Engine
from service.engine.group import EngineGroup
from service.engine.request import LaneName
from service.errors import Draining, EngineStopped
from service.metrics import Metrics
from tests.fakes import fake_pipeline
from tests.service.engine_requests import REQUEST, TIMEOUT_S, assert_equals_alone, images, wait_for

OLD, NEW = LaneName("fake-16", 1), LaneName("fake-16", 2)
NEW_REQUEST = replace(REQUEST, version=2)


def engine_of(pipeline: LaMambaPipeline) -> Engine:
    return Engine({OLD: pipeline}, max_rows=4, max_queue_images=64, metrics=Metrics())


@pytest.fixture
def old() -> LaMambaPipeline:
    return fake_pipeline()


@pytest.fixture
def stepped(old: LaMambaPipeline) -> Iterator[Engine]:
    """An engine whose steps are the test's."""
    engine = engine_of(old)
    yield engine
    engine.stop()


def test_a_lane_is_warmed_between_steps_and_then_serves(stepped: Engine, old: LaMambaPipeline) -> None:
    new: Any = fake_pipeline()
    stepped.submit(REQUEST)
    joined = stepped.add_lane(NEW, new)
    parts = 0
    while not joined.done():
        steps_before = len(old.network.rows_of_calls)  # type: ignore[attr-defined]
        done_before = len(new.network.rows_of_calls) + len(new.autoencoder.batches)
        assert not stepped.serves(NEW)
        assert stepped.step()
        parts += 1
        assert len(old.network.rows_of_calls) == steps_before + 1  # type: ignore[attr-defined]
        assert len(new.network.rows_of_calls) + len(new.autoencoder.batches) <= done_before + 1
    assert parts >= 2
    assert stepped.serves(NEW)
    rows_of_warm_up = len(new.network.rows_of_calls)
    stepped.submit(NEW_REQUEST)
    while stepped.step():
        pass
    assert len(new.network.rows_of_calls) == rows_of_warm_up + REQUEST.num_inference_steps


def test_a_lane_whose_warm_up_fails_changes_nothing(stepped: Engine) -> None:
    broken = fake_pipeline()
    broken.network.failing_label = 0  # type: ignore[attr-defined]
    joined = stepped.add_lane(NEW, broken)
    while stepped.step():
        pass
    with pytest.raises(RuntimeError, match="the device fails"):
        joined.result(0)
    assert (stepped.serves(OLD), stepped.serves(NEW)) == (True, False)
    again = stepped.add_lane(NEW, fake_pipeline())
    while stepped.step():
        pass
    assert again.result(0) is None


def test_a_removed_lane_makes_what_it_had_accepted_and_lets_its_model_go() -> None:
    pipelines = [fake_pipeline(), fake_pipeline()]
    gone = weakref.ref(pipelines[0])
    engine = engine_of(pipelines[0])
    engine.start()
    engine.add_lane(NEW, pipelines[1]).result(TIMEOUT_S)
    tickets = [engine.submit(replace(REQUEST, seed=seed)) for seed in range(5)]
    engine.remove_lane(OLD)
    for ticket in tickets:
        assert_equals_alone(ticket, pipelines[0])
    del pipelines[0]
    wait_for(lambda: gone() is None)  # at once, without the garbage collector
    assert not engine.serves(OLD)
    assert_equals_alone(engine.submit(NEW_REQUEST), pipelines[0])
    engine.stop()


def test_a_request_that_is_given_up_as_its_lane_goes_does_no_harm(stepped: Engine) -> None:
    joined = stepped.add_lane(NEW, fake_pipeline())
    while stepped.step():
        pass
    joined.result(0)
    ticket = stepped.submit(REQUEST)
    stepped.step()
    ticket.cancel()  # its future wakes whoever removes the lane, before the engine has dropped the request
    stepped.remove_lane(OLD)
    stepped.step()
    stepped.cancel(ticket)
    stepped._close(ticket)
    while stepped.step():
        pass
    assert not stepped.serves(OLD)
    assert stepped._scheduler.num_active == stepped._scheduler.num_waiting == 0


def test_an_engine_that_ends_says_so_to_whoever_waits_for_a_lane(stepped: Engine) -> None:
    joined = stepped.add_lane(NEW, fake_pipeline())
    stepped.stop()
    with pytest.raises(Draining):
        joined.result(0)
    with pytest.raises(EngineStopped):
        stepped.add_lane(NEW, fake_pipeline())


def test_an_engine_that_dies_of_a_warm_up_says_so() -> None:
    engine = engine_of(fake_pipeline())
    engine.start()
    lethal = fake_pipeline()
    lethal.network.before_call = _break  # type: ignore[attr-defined]
    with pytest.raises(EngineStopped):
        engine.add_lane(NEW, lethal).result(TIMEOUT_S)
    engine.stop()


def _break() -> None:
    raise torch.AcceleratorError("the device is broken")


class Group:
    """Two engines on fake devices; what is built and loaded for them is kept."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.pipelines = {(OLD, index): fake_pipeline() for index in range(2)}
        self.rebuilt: list[list[LaneName]] = []
        self.before_rebuild = threading.Event()
        self.before_rebuild.set()
        self.group = EngineGroup(
            [self._engine({OLD: self.pipelines[OLD, index]}) for index in range(2)],
            lanes={OLD: lambda index: self.load(OLD, index)},
            rebuild=self._rebuild,
            metrics=self.metrics,
        )
        self.group.start()

    def load(self, lane: LaneName, index: int) -> LaMambaPipeline:
        self.pipelines[lane, index] = fake_pipeline()
        return self.pipelines[lane, index]

    def add(self, lane: LaneName = NEW) -> None:
        self.group.add_lane(lane, lambda index: self.load(lane, index))

    def serving(self, lane: LaneName) -> list[bool]:
        return [engine.serves(lane) for engine in self.group._engines]

    def kill(self, lane: LaneName, index: int) -> None:
        self.pipelines[lane, index].network.before_call = _break  # type: ignore[attr-defined]

    def _engine(self, pipelines: dict[LaneName, LaMambaPipeline]) -> Engine:
        return Engine(pipelines, max_rows=4, max_queue_images=64, metrics=self.metrics)

    def _rebuild(self, index: int, lanes: Any) -> Engine:
        self.rebuilt.append(sorted(lanes))
        pipelines = {lane: load(index) for lane, load in lanes.items()}
        self.before_rebuild.wait(TIMEOUT_S)
        return self._engine(pipelines)


@pytest.fixture
def devices() -> Iterator[Group]:
    group = Group()
    yield group
    group.before_rebuild.set()
    group.group.stop()


def test_all_engines_of_a_group_serve_a_new_lane(devices: Group) -> None:
    devices.add()
    assert devices.serving(NEW) == [True, True]
    tickets = [devices.group.submit(replace(NEW_REQUEST, seed=seed)) for seed in range(6)]
    for ticket in tickets:
        assert_equals_alone(ticket, devices.pipelines[NEW, 0])
    assert all(devices.pipelines[NEW, index].network.rows_of_calls for index in range(2))  # type: ignore[attr-defined]


def test_where_one_engine_cannot_serve_a_lane_none_does(devices: Group) -> None:
    def load(index: int) -> LaMambaPipeline:
        pipeline = fake_pipeline()
        pipeline.network.nan_label = index - 1  # type: ignore[attr-defined]  # the second one's class 0
        return pipeline

    with pytest.raises(ArithmeticError, match="not finite"):
        devices.group.add_lane(NEW, load)
    wait_for(lambda: devices.serving(NEW) == [False, False])
    assert devices.serving(OLD) == [True, True]
    with pytest.raises(EngineStopped):
        devices.group.submit(NEW_REQUEST)
    assert_equals_alone(devices.group.submit(REQUEST), devices.pipelines[OLD, 0])


def test_a_retired_lane_is_kept_until_its_last_image_wherever_that_is_made(devices: Group) -> None:
    devices.add()
    gate = threading.Event()
    for index in range(2):
        network: Any = devices.pipelines[OLD, index].network
        network.before_call = lambda: gate.wait(TIMEOUT_S) and None
    tickets = [devices.group.submit(replace(REQUEST, seed=seed)) for seed in range(4)]
    devices.group.retire_lane(OLD)
    assert devices.group.retiring_images("fake-16") == {1: 4}
    devices.kill(OLD, 0)
    gate.set()
    for ticket in tickets:  # those of the first engine moved to the second
        assert_equals_alone(ticket, devices.pipelines[OLD, 1])
    assert max(ticket.restarts for ticket in tickets) == 1
    wait_for(lambda: devices.group.num_alive == 2 and devices.serving(OLD) == [False, False])
    assert devices.group.retiring_images("fake-16") == {}
    assert devices.serving(NEW) == [True, True]
    assert devices.rebuilt == [[NEW]]


def test_a_lane_that_retires_while_an_engine_is_made_again_is_not_in_it(devices: Group) -> None:
    devices.add()
    break_the_first(devices)
    devices.group.retire_lane(OLD)
    devices.before_rebuild.set()
    wait_for(lambda: devices.group.num_alive == 2)
    wait_for(lambda: devices.serving(OLD) == [False, False])
    assert devices.rebuilt == [[OLD, NEW]]
    assert_equals_alone(devices.group.submit(NEW_REQUEST), devices.pipelines[NEW, 0])


def test_an_engine_that_is_made_again_during_a_load_gets_the_lane_too(devices: Group) -> None:
    break_the_first(devices)
    adding = threading.Thread(target=devices.add)
    adding.start()
    devices.before_rebuild.set()
    adding.join(TIMEOUT_S)
    assert devices.rebuilt == [[OLD]]
    assert devices.serving(NEW) == [True, True]


def test_a_group_without_an_engine_takes_no_lane() -> None:
    pipeline, metrics = fake_pipeline(), Metrics()
    group = EngineGroup(
        [Engine({OLD: pipeline}, max_rows=4, max_queue_images=64, metrics=metrics)],
        lanes={OLD: lambda index: pipeline},
        rebuild=lambda index, lanes: pytest.fail("one engine alone is not made again"),
        metrics=metrics,
    )
    group.start()
    pipeline.network.before_call = _break  # type: ignore[attr-defined]
    with pytest.raises(EngineStopped):
        images(group.submit(REQUEST))
    with pytest.raises(EngineStopped):
        group.add_lane(NEW, lambda index: pipeline)
    group.stop()


def break_the_first(devices: Group) -> None:
    """Have the first engine die of a request, which the second makes, and be half made again."""
    devices.before_rebuild.clear()
    devices.kill(OLD, 0)
    assert_equals_alone(devices.group.submit(REQUEST), devices.pipelines[OLD, 1])
    wait_for(lambda: len(devices.rebuilt) == 1)
