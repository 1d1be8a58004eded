"""service/engine: if this fails, users get each other's pictures, wait for strangers, or are never answered.

The engine runs on the CPU with a fake network; what its hooks do happens in the engine's thread, between
the same two steps in every run, so no test waits for a clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.diffusion.samplers import sampler_table
from model.pipeline import LaMambaPipeline
from service.engine.engine import Engine
from service.engine.request import LaneName, Preview, Ticket
from service.engine.runner import Runner
from service.errors import DeadlineExceeded, Draining, EngineStopped, GenerationFailed, QueueFull
from service.metrics import Metrics
from tests.fakes import fake_pipeline
from tests.service.engine_requests import (
    REQUEST,
    TIMEOUT_S,
    TOLERANCE,
    alone,
    assert_equals_alone,
    images,
)

EngineFactory = Callable[..., Engine]


@pytest.fixture
def engine_of() -> Iterator[EngineFactory]:
    """Makes engines and stops them at the end of the test."""
    engines: list[Engine] = []

    def make(*pipelines: LaMambaPipeline, start: bool = True, **options: Any) -> Engine:
        options = {"max_rows": 8, "max_queue_images": 64, "metrics": Metrics()} | options
        engine = Engine({LaneName(pipeline.name): pipeline for pipeline in pipelines}, **options)
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


def test_engine_mixed_samplers_steps_and_guidance_equal_each_image_alone(engine_of: EngineFactory) -> None:
    small, large = fake_pipeline(), fake_pipeline("fake-32", resolution=32)
    engine = engine_of(small, large, max_rows=7)
    requests = [
        replace(
            REQUEST,
            request_id=f"r{index}",
            model=("fake-16", "fake-32")[index % 2],
            class_label=index % 5,
            guidance_scale=(1.0, 1.5, 4.0, 20.0)[index % 4],
            guidance_interval=(None, (0, 500), (300, 800), (600, 999), (1, 2))[index % 5],
            num_inference_steps=1 + index % 9,
            sampler=("ddpm", "ddim", "dpm++")[index % 3],
            seed=(0, 2**40, 2**63 - 1)[index % 3] - (index if index % 3 else 0),
            num_images=1 + index % 3,
        )
        for index in range(24)
    ]
    tickets = [engine.submit(request) for request in requests]
    for ticket in tickets:
        assert_equals_alone(ticket, small if ticket.request.model == "fake-16" else large)
    assert engine.wait_idle(TIMEOUT_S)
    assert engine.open_rows == 0


def test_engine_a_step_outside_of_the_guidance_interval_costs_one_row(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline, start=False, max_rows=4)
    request = replace(REQUEST, num_images=3, guidance_interval=(300, 700))
    ticket = engine.submit(request)
    timesteps = sampler_table("dpm++", REQUEST.num_inference_steps, pipeline.schedule).timesteps.tolist()
    rows = [2 if 300 <= timestep <= 700 else 1 for timestep in timesteps]
    assert engine.open_rows == 3 * sum(rows)
    while engine.step():
        pass
    network: Any = pipeline.network
    assert network.rows_of_calls[0] == 3
    assert max(network.rows_of_calls) == 4
    assert sum(network.rows_of_calls) == 3 * sum(rows)
    assert all(job.finished for job in ticket.jobs)


class FakeGpu:
    """When what an engine launches is done: at the moment when the engine waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now = 0.0
        gpu = self

        class Launched:
            def __init__(self) -> None:
                self.number = sum(entry.startswith("launch") for entry in gpu.log)

            def synchronize(self) -> None:
                gpu.log.append(f"done {self.number}")
                gpu.now += 1.0

        monkeypatch.setattr(Runner, "launched", lambda runner: Launched())

    def launch(self) -> None:
        self.log.append("launch")
        self.now += 0.25

    def engine(self, pipeline: LaMambaPipeline, **options: Any) -> Engine:
        """One whose steps are the test's and that launches ahead."""
        network: Any = pipeline.network
        network.before_call = self.launch
        options = {"max_rows": 8, "max_queue_images": 64, "metrics": Metrics()} | options
        engine = Engine({LaneName(pipeline.name): pipeline}, clock=lambda: self.now, **options)
        engine._steps_ahead = 1
        return engine


def test_engine_a_gpu_has_its_next_step_before_it_is_done_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, metrics = FakeGpu(monkeypatch), Metrics()
    engine = gpu.engine(fake_pipeline(), metrics=metrics)
    ticket = engine.submit(replace(REQUEST, num_inference_steps=3))
    handed_over = []
    while engine.step():
        handed_over.append(engine._decoder.backlog)
    assert gpu.log == ["launch", "launch", "done 1", "launch", "done 2", "done 3"]
    assert handed_over == [0, 0, 0, 1]  # not before its last step is done
    assert ticket.denoised_at == gpu.now
    # Each moment counts once, the host's as long as the device has nothing to do.
    assert engine._scheduler._lanes[LaneName(REQUEST.model)].virtual_time_s == gpu.now
    engine.stop()


def test_engine_a_step_without_memory_is_charged_without_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, pipeline = FakeGpu(monkeypatch), fake_pipeline()
    engine = gpu.engine(pipeline)
    network: Any = pipeline.network
    engine.submit(replace(REQUEST, num_inference_steps=3))
    assert engine.step()
    engine.submit(replace(REQUEST, seed=1, num_inference_steps=1))
    network.rows_that_fit = 2
    assert engine.step()  # while the first step is under way
    assert engine._scheduler._lanes[LaneName(REQUEST.model)].virtual_time_s == gpu.now
    assert engine._scheduler.row_limit.value == 2
    engine.stop()


def test_engine_is_woken_by_a_backlog_of_images_that_were_given_up(engine_of: EngineFactory) -> None:
    engine = engine_of(fake_pipeline(), start=False, max_rows=2)
    unguided = replace(REQUEST, guidance_scale=1.0, num_inference_steps=1)
    left = engine.submit(replace(unguided, num_images=2))
    assert engine.step()
    assert engine._decoder.backlog == 2
    waiting = engine.submit(unguided)
    engine.cancel(left)
    assert not engine.step()  # and sleeps until there is a command
    engine._decoder._decode_next()
    assert not engine._inbox.empty()
    assert engine.step()
    assert waiting.steps_done == 1


def test_engine_a_gpu_is_done_with_a_step_before_a_part_of_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    engine = gpu.engine(fake_pipeline())
    to_come = fake_pipeline("to-come")

    def warm_up() -> None:
        gpu.log.append("warm-up")
        gpu.now += 10.0

    to_come.network.before_call = warm_up  # type: ignore[attr-defined]
    engine.submit(replace(REQUEST, num_inference_steps=2))
    engine.add_lane(LaneName("to-come"), to_come)
    while engine.step():
        pass
    assert gpu.log == ["launch", "done 1", "warm-up", "launch", "done 2"]
    assert engine._scheduler._lanes[LaneName(REQUEST.model)].virtual_time_s == gpu.now - 10.0
    engine.stop()


def test_engine_previews_are_shown_when_their_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    engine = gpu.engine(fake_pipeline())
    shown: list[tuple[str, list[int]]] = []

    class Watcher:
        def changed(self, previews: Sequence[Preview]) -> None:
            if previews:
                shown.append((gpu.log[-1], [preview.steps_done for preview in previews]))

    engine.submit(replace(REQUEST, num_inference_steps=3, num_previews=2), watcher=Watcher())
    while engine.step():
        pass
    assert shown == [("done 1", [1]), ("done 2", [2])]
    engine.stop()


def test_engine_a_request_joins_the_running_batch_and_a_finished_one_leaves(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline, start=False)
    network: Any = pipeline.network
    late: list[Ticket] = []

    def submit_at_third_step() -> None:
        if len(network.rows_of_calls) == 2:
            late.append(engine.submit(replace(REQUEST, num_inference_steps=2, seed=5, guidance_scale=1.0)))

    network.before_call = submit_at_third_step
    early = engine.submit(REQUEST)
    while engine.step():
        pass
    assert network.rows_of_calls == [2, 2, 2, 3, 3, 2]
    assert early.jobs[0].finished
    assert late[0].jobs[0].finished
    assert early.started_at is not None
    assert late[0].started_at is not None
    assert early.started_at < late[0].started_at
    assert late[0].denoised_at is not None
    assert early.denoised_at is not None
    assert late[0].denoised_at < early.denoised_at


def test_engine_joining_mid_run_changes_nobody(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)
    network: Any = pipeline.network
    late: list[Ticket] = []
    start = len(network.rows_of_calls)

    def submit_at_some_steps() -> None:
        if len(network.rows_of_calls) - start in (2, 5, 9):
            late.append(engine.submit(replace(REQUEST, seed=100 + len(late), sampler="ddpm", class_label=3)))

    network.before_call = submit_at_some_steps
    early = engine.submit(replace(REQUEST, num_inference_steps=12, sampler="ddpm"))
    images(early)
    network.before_call = lambda: None
    assert len(late) == 3
    for ticket in (early, *late):
        assert_equals_alone(ticket, pipeline)


def test_engine_cancel_frees_the_slot_at_the_next_step_and_leaves_the_neighbours_pixels(
    engine_of: EngineFactory,
) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline, max_rows=4)
    network: Any = pipeline.network
    start = len(network.rows_of_calls)
    rows_at_cancel: list[int] = []
    tickets: list[Ticket] = []

    def cancel_at_fourth_step() -> None:
        if len(network.rows_of_calls) - start == 3:
            rows_at_cancel.append(len(network.rows_of_calls))
            engine.cancel(tickets[1])

    with_neighbour = threading.Event()
    network.before_call = lambda: with_neighbour.wait(TIMEOUT_S) and cancel_at_fourth_step()
    tickets += [engine.submit(replace(REQUEST, seed=seed, num_inference_steps=8)) for seed in (1, 2, 3)]
    with_neighbour.set()
    images(tickets[0])
    images(tickets[2])
    network.before_call = lambda: None
    assert tickets[1].jobs[0].result.cancelled()
    assert_equals_alone(tickets[0], pipeline)
    assert_equals_alone(tickets[2], pipeline)  # it took the slot that the cancelled one left
    assert rows_at_cancel
    assert engine.wait_idle(TIMEOUT_S)


def test_engine_cancel_of_a_finished_request_is_no_cancellation(engine_of: EngineFactory) -> None:
    metrics = Metrics()
    engine = engine_of(fake_pipeline(), metrics=metrics)
    ticket = engine.submit(REQUEST)
    images(ticket)
    engine.cancel(ticket)
    assert b"lamamba_cancellations_total 0.0" in metrics.render()


def test_engine_turns_a_full_queue_away_before_any_work(engine_of: EngineFactory) -> None:
    engine = engine_of(fake_pipeline(), start=False, max_queue_images=5)
    engine.submit(replace(REQUEST, num_images=4))
    with pytest.raises(QueueFull, match=r"4 images wait and 2 more were given; .* accepts 5") as refusal:
        engine.submit(replace(REQUEST, num_images=2))
    assert int(refusal.value.headers()["Retry-After"]) >= 1
    engine.submit(REQUEST)


def test_engine_queue_places_come_back_when_images_start_or_are_cancelled(engine_of: EngineFactory) -> None:
    engine = engine_of(fake_pipeline(), start=False, max_rows=4, max_queue_images=6)
    first = engine.submit(replace(REQUEST, num_images=6))
    engine.step()  # two images started, four wait
    second = engine.submit(replace(REQUEST, num_images=2))
    with pytest.raises(QueueFull):
        engine.submit(REQUEST)
    engine.cancel(first)
    engine.cancel(second)
    engine.step()
    engine.submit(replace(REQUEST, num_images=6))


@pytest.mark.parametrize(
    ("fault", "stage"), [("failing_label", "denoise"), ("nan_label", "decode")], ids=["raises", "nan"]
)
def test_engine_a_failing_request_fails_alone(engine_of: EngineFactory, fault: str, stage: str) -> None:
    pipeline = fake_pipeline()
    metrics = Metrics()
    engine = engine_of(pipeline, metrics=metrics)
    setattr(pipeline.network, fault, 4)
    requests = [
        replace(REQUEST, class_label=index % 5, seed=index, num_images=2, request_id=f"r{index}")
        for index in range(10)
    ]
    tickets = [engine.submit(request) for request in requests]
    for ticket in tickets:
        if ticket.request.class_label == 4:
            with pytest.raises(GenerationFailed, match=stage) as failure:
                images(ticket)
            assert "device" not in str(failure.value)
        else:
            images(ticket)
    setattr(pipeline.network, fault, None)
    for ticket in tickets:
        if ticket.request.class_label != 4:
            assert_equals_alone(ticket, pipeline)
    assert engine.wait_idle(TIMEOUT_S)
    assert engine.alive
    assert f'lamamba_failures_total{{stage="{stage}"}} 2.0'.encode() in metrics.render()
    assert_equals_alone(engine.submit(replace(REQUEST, class_label=4)), pipeline)


def test_engine_out_of_memory_images_go_on_with_fewer_rows_a_step(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    metrics = Metrics()
    engine = engine_of(pipeline, start=False, metrics=metrics)
    network: Any = pipeline.network
    network.rows_that_fit = 2
    tickets = [
        engine.submit(replace(REQUEST, seed=seed, num_images=1 + seed % 3, guidance_interval=interval))
        for seed, interval in enumerate((None, (0, 500), None, (400, 999)))
    ]
    engine.step()
    assert engine.num_waiting_images == 7 - 5  # five have slots, and no step behind them
    text = metrics.render().decode()
    assert 'lamamba_row_limit{device="cpu"} 4.0' in text
    assert 'lamamba_out_of_memory_recoveries_total{device="cpu"} 1.0' in text
    while engine.step():
        pass
    assert max(network.rows_of_calls) <= 2
    assert engine.num_waiting_images == 0
    text = metrics.render().decode()
    assert 'lamamba_row_limit{device="cpu"} 2.0' in text
    assert 'lamamba_failures_total{stage="denoise"} 0.0' in text
    engine.start()
    network.rows_that_fit = None
    for ticket in tickets:
        assert_equals_alone(ticket, pipeline)


def test_engine_an_image_alone_out_of_memory_fails_and_others_go_on(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)
    network: Any = pipeline.network
    network.rows_that_fit = 1
    guided, plain = (
        [engine.submit(replace(REQUEST, seed=seed, guidance_scale=scale)) for seed in range(4)]
        for scale in (2.5, 1.0)
    )
    for ticket in guided:
        with pytest.raises(GenerationFailed, match="denoise"):
            images(ticket)
    for ticket in plain:
        images(ticket)
    network.rows_that_fit = None
    for ticket in plain:
        assert_equals_alone(ticket, pipeline)
    assert engine.alive


def test_engine_the_row_limit_comes_back_once_there_is_memory(engine_of: EngineFactory) -> None:
    metrics = Metrics()
    pipeline = fake_pipeline()
    engine = engine_of(pipeline, metrics=metrics)
    network: Any = pipeline.network
    network.rows_that_fit = 6
    images(engine.submit(replace(REQUEST, num_images=4)))
    assert 'lamamba_row_limit{device="cpu"} 4.0' in metrics.render().decode()
    network.rows_that_fit = None
    images(engine.submit(replace(REQUEST, num_inference_steps=900)))
    assert 'lamamba_row_limit{device="cpu"} 8.0' in metrics.render().decode()


def test_engine_a_failing_decode_fails_its_image_alone(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)
    autoencoder: Any = pipeline.autoencoder
    victim = replace(REQUEST, seed=77, num_inference_steps=12)
    pixels = alone(pipeline, victim)[0, ::4, ::4]  # (h, w, 3): one of each repeated latent pixel

    def refuse_the_victim(latents: torch.Tensor) -> None:
        made = torch.tanh(latents[:, :3]).add(1).mul(127.5).round().movedim(1, -1)  # (n, h, w, 3)
        if (np.abs(made.numpy() - pixels).max(axis=(1, 2, 3)) <= TOLERANCE).any():
            raise RuntimeError("out of memory")

    autoencoder.before_decode = refuse_the_victim
    tickets = [engine.submit(replace(victim, seed=seed)) for seed in (75, 76, 77, 78)]
    for ticket in tickets:
        if ticket.request.seed == 77:
            with pytest.raises(GenerationFailed, match="decode"):
                images(ticket)
        else:
            images(ticket)


def test_engine_does_not_decode_what_is_left_of_a_failed_request(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)
    autoencoder: Any = pipeline.autoencoder
    attempts: list[int] = []

    def refuse(latents: torch.Tensor) -> None:
        attempts.append(len(latents))
        raise RuntimeError("out of memory")

    autoencoder.before_decode = refuse
    for num_images in (8, 1):  # the second is decoded once the decoder is through with the first
        request = replace(REQUEST, num_images=num_images, num_inference_steps=1, guidance_scale=1.0)
        with pytest.raises(GenerationFailed, match="decode"):
            images(engine.submit(request))
    assert len(attempts) <= 6  # of the first batch at most, together and singly, and of the second request


def test_engine_a_request_whose_time_is_over_is_never_admitted(engine_of: EngineFactory) -> None:
    now = [100.0]
    pipeline = fake_pipeline()
    metrics = Metrics()
    engine = engine_of(pipeline, start=False, max_rows=2, metrics=metrics, clock=lambda: now[0])
    running = engine.submit(REQUEST)
    waiting = engine.submit(replace(REQUEST, num_images=3, timeout_s=5.0))
    engine.step()
    now[0] += 4.9
    engine.step()
    assert not waiting.done
    now[0] += 0.1
    engine.step()
    with pytest.raises(DeadlineExceeded, match="timeout_s: 5 s have passed") as given_up:
        images(waiting)
    assert given_up.value.details() == {"queue_s": 5.0, "steps_done": 0, "steps": 18}
    while engine.step():
        pass
    assert running.jobs[0].finished
    network: Any = pipeline.network
    assert network.rows_of_calls == [2] * 6
    text = metrics.render().decode()
    assert 'lamamba_deadline_exceeded_total{stage="queue"} 1.0' in text
    assert 'lamamba_queue_images{device="cpu"} 0.0' in text


def test_engine_the_slots_of_a_request_whose_time_is_over_are_free_at_the_next_step(
    engine_of: EngineFactory,
) -> None:
    now = [100.0]
    pipeline, other = fake_pipeline(), fake_pipeline("fake-32", resolution=32)
    engine = engine_of(pipeline, other, start=False, max_rows=4, clock=lambda: now[0])
    late = engine.submit(replace(REQUEST, num_images=3, timeout_s=5.0))
    engine.step()
    heir = engine.submit(replace(REQUEST, num_images=2, seed=1))
    now[0] += 5.0
    engine.submit(replace(REQUEST, model="fake-32"))
    while engine.step():
        pass
    with pytest.raises(DeadlineExceeded, match=r"waited 0 s for a slot and did 2 of 18 steps"):
        images(late)
    assert heir.started_at == now[0]
    network: Any = pipeline.network
    assert network.rows_of_calls == [4] * 7


def test_engine_a_deadline_comes_though_no_step_runs(engine_of: EngineFactory) -> None:
    """The decoder is stuck, so the engine sleeps, with two images on their way there and one not admitted."""
    pipeline = fake_pipeline()
    metrics = Metrics()
    engine = engine_of(pipeline, max_rows=2, metrics=metrics)
    autoencoder: Any = pipeline.autoencoder
    gate = threading.Event()
    autoencoder.before_decode = lambda latents: gate.wait(TIMEOUT_S)
    stuck = replace(REQUEST, num_inference_steps=1, guidance_scale=1.0)
    tickets = [engine.submit(replace(stuck, timeout_s=timeout_s)) for timeout_s in (0.6, 0.4, 0.5)]
    for ticket in tickets:
        with pytest.raises(DeadlineExceeded):
            images(ticket)
    gate.set()
    assert engine.wait_idle(TIMEOUT_S)
    text = metrics.render().decode()
    assert 'lamamba_deadline_exceeded_total{stage="decode"} 2.0' in text
    assert 'lamamba_deadline_exceeded_total{stage="queue"} 1.0' in text
    assert "lamamba_images_total 0.0" in text


@pytest.mark.parametrize("reason", ["timeout", "error"])
def test_engine_a_client_that_leaves_while_its_images_fail_is_not_counted_as_well(
    engine_of: EngineFactory, reason: str
) -> None:
    """It is told of the first image's failure before the second one has failed."""
    now = [100.0]
    pipeline, metrics = fake_pipeline(), Metrics()
    engine = engine_of(pipeline, start=False, metrics=metrics, clock=lambda: now[0])
    ticket = engine.submit(replace(REQUEST, num_images=2, timeout_s=5.0))
    idle_at_cancel = []

    def leave(_: object) -> None:
        engine.cancel(ticket)
        idle_at_cancel.append(engine.idle)

    ticket.jobs[0].result.add_done_callback(leave)
    if reason == "timeout":
        now[0] += 5.0
    else:
        network: Any = pipeline.network
        network.failing_label = REQUEST.class_label
    while engine.step():
        pass
    for job in ticket.jobs:
        assert isinstance(job.result.exception(0), DeadlineExceeded | GenerationFailed)
    assert idle_at_cancel == [False]  # not yet: it is counted before
    assert engine.idle
    text = metrics.render().decode()
    assert f'lamamba_request_success_total{{finished_reason="{reason}"}} 1.0' in text
    assert 'lamamba_request_success_total{finished_reason="abort"} 0.0' in text
    assert "lamamba_cancellations_total 0.0" in text


def test_engine_a_request_in_time_is_not_given_up(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    metrics = Metrics()
    engine = engine_of(pipeline, metrics=metrics)
    tickets = [engine.submit(replace(REQUEST, seed=seed, timeout_s=TIMEOUT_S)) for seed in range(3)]
    for ticket in tickets:
        assert_equals_alone(ticket, pipeline)
    engine.cancel(engine.submit(replace(REQUEST, num_inference_steps=900, timeout_s=0.2)))
    images(engine.submit(replace(REQUEST, timeout_s=1e300)))
    assert engine.wait_idle(TIMEOUT_S)
    assert 'lamamba_deadline_exceeded_total{stage="denoise"} 0.0' in metrics.render().decode()


def test_engine_drain_finishes_what_was_accepted_and_takes_no_more(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)
    tickets = [engine.submit(replace(REQUEST, seed=seed, num_images=3)) for seed in range(5)]
    engine.drain()
    with pytest.raises(Draining):
        engine.submit(REQUEST)
    assert engine.wait_idle(TIMEOUT_S)
    for ticket in tickets:
        assert_equals_alone(ticket, pipeline)


def test_engine_stop_answers_whatever_is_left(engine_of: EngineFactory) -> None:
    engine = engine_of(fake_pipeline(), start=False)
    ticket = engine.submit(REQUEST)
    engine.stop()
    with pytest.raises(Draining):
        images(ticket)
    assert engine.idle
    with pytest.raises((Draining, EngineStopped)):
        engine.submit(REQUEST)


@pytest.mark.parametrize("error", [SystemExit(), torch.AcceleratorError("device-side assert triggered")])
def test_engine_a_dead_thread_answers_everyone_and_says_so(
    engine_of: EngineFactory, error: BaseException
) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)
    assert engine.alive

    def die() -> None:
        raise error

    network: Any = pipeline.network
    network.before_call = die
    with pytest.raises(EngineStopped):
        images(engine.submit(REQUEST))
    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.submit(REQUEST)


def test_engine_a_device_that_breaks_in_the_decoder_ends_the_engine(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline)

    def fail(latents: torch.Tensor) -> None:
        raise torch.AcceleratorError("device-side assert triggered")

    decoder: Any = pipeline.autoencoder
    decoder.before_decode = fail
    with pytest.raises(EngineStopped):  # and not this request alone
        images(engine.submit(REQUEST))
    assert not engine.alive


def test_engine_a_decoder_that_dies_during_a_step_leaves_the_queue_empty(engine_of: EngineFactory) -> None:
    metrics = Metrics()
    engine = engine_of(fake_pipeline(), start=False, metrics=metrics)
    ticket = engine.submit(REQUEST)
    engine.decoder_stopped(RuntimeError("out of memory"))
    engine.step()  # the one that was about to begin
    with pytest.raises(EngineStopped):
        images(ticket)
    assert 'lamamba_queue_images{device="cpu"} 0.0' in metrics.render().decode()


def test_engine_start_raises_what_the_warm_up_raised(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    network: Any = pipeline.network
    network.failing_label = 0
    engine = engine_of(pipeline, start=False)
    with pytest.raises(RuntimeError, match="fails on class 0"):
        engine.start()
    assert not engine.alive


def test_engine_admits_nobody_while_the_decoder_lags(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline()
    engine = engine_of(pipeline, max_rows=4)
    autoencoder: Any = pipeline.autoencoder
    gate = threading.Event()
    autoencoder.before_decode = lambda latents: gate.wait(TIMEOUT_S)
    ticket = engine.submit(replace(REQUEST, num_images=16, num_inference_steps=1))
    network: Any = pipeline.network
    calls_before = len(network.rows_of_calls)
    gate.set()
    images(ticket)
    assert len(network.rows_of_calls) - calls_before <= 8
    assert_equals_alone(ticket, pipeline)


def test_engine_an_unconditional_model_makes_images(engine_of: EngineFactory) -> None:
    pipeline = fake_pipeline(num_classes=0)
    engine = engine_of(pipeline)
    ticket = engine.submit(replace(REQUEST, class_label=pipeline.null_label, guidance_scale=1.0))
    assert_equals_alone(ticket, pipeline)


def test_engine_measures_stages_and_counts_work(engine_of: EngineFactory) -> None:
    metrics = Metrics()
    ticks = iter(range(10_000))
    engine = engine_of(fake_pipeline(), metrics=metrics, clock=lambda: float(next(ticks)))
    ticket = engine.submit(replace(REQUEST, num_images=3))
    images(ticket)
    assert engine.wait_idle(TIMEOUT_S)
    seconds = ticket.stage_seconds
    assert list(seconds) == ["queue", "denoise", "decode"]
    assert all(value > 0 for value in seconds.values())
    text = metrics.render().decode()
    assert "lamamba_images_total 3.0" in text
    assert "lamamba_denoising_steps_total 6.0" in text
    assert "lamamba_rows_total 36.0" in text
    assert 'lamamba_num_requests_running{device="cpu"} 0.0' in text
    assert 'lamamba_num_requests_waiting{device="cpu"} 0.0' in text
