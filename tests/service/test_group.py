"""service/engine/group.py: if this fails, a broken GPU loses requests, or one idles while others queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from model.pipeline import LaMambaPipeline
from service.engine.engine import Engine
from service.engine.group import EngineGroup
from service.engine.request import LaneName, Ticket
from service.errors import Draining, EngineStopped, QueueFull
from service.metrics import Metrics
from service.runtime import serving_devices
from tests.fakes import fake_pipeline
from tests.service.engine_requests import REQUEST, TIMEOUT_S, assert_equals_alone, images, wait_for


class Broken(torch.AcceleratorError):
    """What every call on a device raises after the first that failed: an engine dies of it."""


class Devices:
    """Fake devices, each an engine; `breaks` says which die at their next step."""

    def __init__(self, count: int, *, max_queue_images: int = 64) -> None:
        self.pipelines: list[LaMambaPipeline] = []
        self.breaks: set[int] = set()
        self.builds = 0
        self.refuses = False
        self.gate = threading.Event()
        self.gate.set()
        self._max_queue_images = max_queue_images
        self.metrics = Metrics()
        self.group = EngineGroup(
            [self.engine(index) for index in range(count)],
            lanes={REQUEST.lane: lambda index: fake_pipeline()},
            rebuild=lambda index, lanes: self.engine(index),
            metrics=self.metrics,
        )

    def engine(self, index: int) -> Engine:
        self.builds += 1
        if self.refuses:
            raise RuntimeError("the device is gone")
        pipeline = fake_pipeline()
        pipeline.network.before_call = lambda: self._step(index)
        self.pipelines[index : index + 1] = [pipeline]
        return Engine(
            {LaneName(pipeline.name): pipeline},
            max_rows=4,
            max_queue_images=self._max_queue_images,
            metrics=self.metrics,
        )

    def _step(self, index: int) -> None:
        self.gate.wait(TIMEOUT_S)
        if index in self.breaks:
            self.breaks.discard(index)
            raise Broken(f"device {index} is broken")


DevicesFactory = Callable[..., Devices]


@pytest.fixture
def devices_of() -> Iterator[DevicesFactory]:
    """Makes groups and stops them at the end of the test."""
    made: list[Devices] = []

    def make(count: int, **options: int) -> Devices:
        devices = Devices(count, **options)
        devices.group.start()
        made.append(devices)
        return devices

    yield make
    for devices in made:
        devices.gate.set()
        devices.group.stop()


def submit(devices: Devices, count: int, **changes: object) -> list[Ticket]:
    return [
        devices.group.submit(replace(REQUEST, seed=seed, request_id=str(seed), **changes))  # type: ignore[arg-type]
        for seed in range(count)
    ]


def test_requests_go_to_the_engine_with_the_least_work(devices_of: DevicesFactory) -> None:
    devices = devices_of(2)
    devices.gate.clear()
    tickets = submit(devices, 1, num_images=3) + submit(devices, 3)
    loads = [engine.open_rows for engine in devices.group._engines]
    devices.gate.set()
    for ticket in tickets:
        assert_equals_alone(ticket, devices.pipelines[0])
    steps = REQUEST.num_inference_steps
    assert loads == [3 * 2 * steps, 3 * 2 * steps]
    assert all(max(pipeline.network.rows_of_calls) >= 2 for pipeline in devices.pipelines)


def test_a_dead_engines_requests_are_made_by_another_and_it_is_replaced(devices_of: DevicesFactory) -> None:
    devices = devices_of(2)
    devices.gate.clear()
    tickets = submit(devices, 12)
    devices.breaks.add(0)
    devices.gate.set()
    for ticket in tickets:
        assert_equals_alone(ticket, devices.pipelines[1])
    assert sorted({ticket.restarts for ticket in tickets}) == [0, 1]
    wait_for(lambda: devices.group.num_alive == 2)
    assert devices.builds == 3
    again = submit(devices, 4)
    for ticket in again:
        assert_equals_alone(ticket, devices.pipelines[1])
    assert devices.pipelines[0].network.rows_of_calls  # the new one's
    assert devices.group.failure is None
    wait_for(lambda: devices.group.idle)


def test_images_made_before_their_engine_died_are_not_made_again(devices_of: DevicesFactory) -> None:
    devices = devices_of(2)
    devices.gate.clear()
    ticket = submit(devices, 1, num_images=6)[0]  # 2 at a time by 4 rows
    first = ticket.jobs[0].result
    first.add_done_callback(lambda _: devices.breaks.add(0))
    devices.gate.set()
    pixels = first.result(TIMEOUT_S)
    assert_equals_alone(ticket, devices.pipelines[1])
    assert ticket.jobs[0].result.result() is pixels
    assert ticket.restarts == 1
    assert ticket.jobs[0] not in ticket.unmade


def test_a_request_that_kills_two_engines_is_answered_with_engine_stopped(devices_of: DevicesFactory) -> None:
    devices = devices_of(3)
    for pipeline in devices.pipelines:
        pipeline.network.before_call = _break
    ticket = submit(devices, 1)[0]
    with pytest.raises(EngineStopped):
        images(ticket)
    wait_for(lambda: devices.group.num_alive == 3)
    assert devices.builds == 5
    assert 'request_success_total{finished_reason="error"} 1.0' in devices.metrics.render().decode()


def test_with_no_engine_left_the_group_has_failed(devices_of: DevicesFactory) -> None:
    devices = devices_of(2)
    devices.refuses = True
    for pipeline in devices.pipelines:
        pipeline.network.before_call = _break
    ticket = submit(devices, 1)[0]
    with pytest.raises(EngineStopped):
        images(ticket)
    assert isinstance(devices.group.failure, Broken)
    with pytest.raises(EngineStopped):
        submit(devices, 1)


def test_one_engine_alone_is_not_replaced(devices_of: DevicesFactory) -> None:
    devices = devices_of(1)
    devices.breaks.add(0)
    ticket = submit(devices, 1)[0]
    with pytest.raises(EngineStopped):
        images(ticket)
    assert isinstance(devices.group.failure, Broken)
    assert devices.builds == 1


def test_a_cancelled_request_does_not_start_again(devices_of: DevicesFactory) -> None:
    devices = devices_of(2)
    devices.gate.clear()
    tickets = submit(devices, 8)
    for ticket in tickets:
        devices.group.cancel(ticket)
    devices.breaks.update({0, 1})
    devices.gate.set()
    wait_for(lambda: devices.group.idle)
    assert all(ticket.jobs[0].result.cancelled() and not ticket.restarts for ticket in tickets)


def test_a_request_that_is_cancelled_between_two_engines_does_no_harm(
    devices_of: DevicesFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = devices_of(2)
    evacuate = Engine.evacuate

    def evacuated(engine: Engine, timeout_s: float) -> list[Ticket]:
        tickets = evacuate(engine, timeout_s)
        devices.group.cancel(tickets[0])
        return tickets

    monkeypatch.setattr(Engine, "evacuate", evacuated)
    devices.gate.clear()
    tickets = submit(devices, 4)
    devices.breaks.add(0)
    devices.gate.set()
    wait_for(lambda: devices.group.idle and devices.group.num_alive == 2)
    given_up = [ticket for ticket in tickets if ticket.jobs[0].result.cancelled()]
    assert [ticket.restarts for ticket in given_up] == [0]
    for ticket in set(tickets) - set(given_up):
        assert_equals_alone(ticket, devices.pipelines[1])
    assert devices.builds == 3


def test_the_queue_is_full_when_every_engines_is(devices_of: DevicesFactory) -> None:
    devices = devices_of(2, max_queue_images=4)
    devices.gate.clear()
    for engine in devices.group._engines:
        wait_for(lambda engine=engine: engine.num_waiting_images == 0)  # type: ignore[misc]
    with pytest.raises(QueueFull, match="4 more were given; this server accepts 8"):
        submit(devices, 9, num_images=4)


def test_a_draining_group_finishes_what_it_has(devices_of: DevicesFactory) -> None:
    devices = devices_of(2)
    devices.gate.clear()
    tickets = submit(devices, 4)
    devices.group.drain()
    with pytest.raises(Draining):
        submit(devices, 1)
    devices.breaks.add(0)
    devices.gate.set()
    for ticket in tickets:
        assert_equals_alone(ticket, devices.pipelines[1])


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", "", ["cuda"]),
        ("cpu", "", ["cpu"]),
        ("auto", "all", ["cuda:0", "cuda:1"]),
        ("auto", "1", ["cuda:1"]),
    ],
)
def test_serving_devices(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: str, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(one) for one in serving_devices(device, gpus)] == expected


def test_serving_devices_names_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="'cuda:2' given; this machine offers cpu, cuda:0, cuda:1"):
        serving_devices("auto", "0,2")
    with pytest.raises(ValueError, match="gpus: all given beside device cpu"):
        serving_devices("cpu", "all")


def _break() -> None:
    raise Broken("the device is broken")
