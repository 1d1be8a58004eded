"""The server under many clients, leaving ones, and at its own end: if this fails, answers get lost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.pipeline import LaMambaPipeline
from service.app import create_app
from service.errors import EngineFailure, StartupError
from service.model_loading import ModelSource
from service.runtime import Runtime
from service.server import DrainingServer, bind_socket, run_server
from service.settings import Settings
from tests.fakes import LABELS, fake_pipeline
from tests.service.conftest import ClientFactory, leave_at_third_step, with_client
from tests.tiny_model import save_tiny_model

TIMEOUT_S = 30.0
BODY: dict[str, Any] = {"class_id": 2, "steps": 4, "seed": 9}


def pixels(b64: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(b64))) as image:
        return np.asarray(image).astype(int)


def test_200_concurrent_mixed_requests_are_each_answered_with_their_own_images() -> None:
    small, large = fake_pipeline(), fake_pipeline("fake-32", resolution=32)
    app = create_app(Settings(max_rows=16, max_queue_images=400), (small, large))
    bodies = [
        {
            "class_id": index % len(LABELS),
            "cfg_scale": (1.0, 2.5, 7.0)[index % 3],
            "steps": 1 + index % 12,
            "sampler": ("ddpm", "ddim", "dpm++")[index % 3],
            "seed": index,
            "resolution": (16, 32)[index % 2],
            "num_images": 1 + index % 2,
        }
        for index in range(200)
    ]

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        return list(await asyncio.gather(*(client.post("/generate", json=body) for body in bodies)))

    answers = asyncio.run(with_client(app, talk))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["images"]) == body["num_images"]
        pipeline = small if body["resolution"] == 16 else large
        for image in answer.json()["images"]:
            alone = pipeline.generate(
                [body["class_id"]],
                seeds=[body["seed"]],
                image_indices=[image["image_index"]],
                guidance_scale=body["cfg_scale"],
                num_inference_steps=body["steps"],
                sampler=body["sampler"],
            )[0]
            assert np.abs(pixels(image["b64_json"]) - alone.numpy().astype(int)).max() <= 1


def test_a_client_that_leaves_gives_its_slot_back() -> None:
    pipeline = fake_pipeline()
    app = create_app(Settings(), (pipeline,))
    network: Any = pipeline.network

    async def talk(client: httpx.AsyncClient) -> int:
        calls_before = len(network.rows_of_calls)
        await leave_at_third_step(app, network, "/generate", BODY | {"steps": 1000})
        neighbour = await client.post("/generate", json=BODY)
        assert neighbour.status_code == 200
        metrics = (await client.get("/metrics")).text
        assert "lamamba_cancellations_total 1.0" in metrics
        assert 'lamamba_requests_total{route="/generate",status="499"} 1.0' in metrics
        return len(network.rows_of_calls) - calls_before

    steps_taken = asyncio.run(with_client(app, talk))
    assert steps_taken <= 3 + 1 + BODY["steps"]


def test_a_body_that_never_comes_is_not_waited_for() -> None:
    app = create_app(Settings(body_timeout_s=0.05), (fake_pipeline(),))

    async def send_nothing(client: httpx.AsyncClient) -> httpx.Response:
        started: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            started.append(message)

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
        await app(scope, receive, send)  # type: ignore[arg-type]
        return httpx.Response(started[0]["status"])

    assert asyncio.run(with_client(app, send_nothing)).status_code == 408
    runtime: Runtime = app.state.runtime
    assert b'lamamba_rejections_total{code="body_timeout"} 1.0' in runtime.metrics.render()


def test_probes_follow_the_engine(client_of: ClientFactory) -> None:
    pipeline = fake_pipeline()
    client = client_of(pipeline)
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").json() == {"status": "ready"}

    def die() -> None:
        raise SystemExit

    pipeline.network.before_call = die  # type: ignore[attr-defined]
    answer = client.post("/generate", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
    assert answer.headers["retry-after"]
    assert client.get("/health/live").status_code == 503
    assert client.get("/health/ready").status_code == 503


@pytest.mark.parametrize(
    ("fault", "message"),
    [("failing_label", "RuntimeError: the device fails"), ("nan_label", "ArithmeticError: fake-16 computes")],
    ids=["raises", "nan"],
)
def test_a_model_whose_first_image_fails_is_a_failed_start(fault: str, message: str) -> None:
    pipeline = fake_pipeline()
    setattr(pipeline.network, fault, 0)
    app = create_app(Settings(), (pipeline,))

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await client.get("/health/live"),
            await client.get("/health/ready"),
            await client.post("/generate", json=BODY),
        ]

    answers = asyncio.run(with_client(app, talk))
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert answers[0].json() == {"status": "failed"}
    runtime: Runtime = app.state.runtime
    assert f"the first image failed: {message}" in str(runtime.failure)


def test_before_the_models_are_loaded_only_liveness_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = threading.Event()

    def load(source: ModelSource, device: torch.device, settings: Settings) -> LaMambaPipeline:
        loading.wait(TIMEOUT_S)
        return fake_pipeline()

    monkeypatch.setattr("service.model_loading.load_pipeline", load)
    app = create_app(Settings(models=("folder",)))

    async def talk(client: httpx.AsyncClient) -> list[Any]:
        before = [await client.get("/health/live"), await client.get("/health/ready")]
        started = [await client.get("/health/startup")]
        assert (await client.get("/version")).json()["models"] == []
        before += [await client.post("/generate", json={}), await client.get("/v1/models")]
        before.append(await client.post("/generate", json={"steps": "x"}))
        loading.set()
        while (await client.get("/health/ready")).status_code != 200:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.001)
        started.append(await client.get("/health/startup"))
        assert [answer.status_code for answer in started] == [503, 200]
        return [*before, await client.post("/generate", json=BODY)]

    answers = asyncio.run(with_client(app, talk))
    assert [answer.status_code for answer in answers] == [200, 503, 503, 503, 503, 200]
    assert answers[1].json() == {"status": "loading"}
    assert answers[2].json()["error"]["code"] == "not_ready"
    assert answers[2].headers["retry-after"]


def test_metrics_have_the_names_that_dashboards_use(client_of: ClientFactory) -> None:
    client = client_of()
    assert client.post("/generate", json=BODY).status_code == 200
    assert client.post("/generate", json={}).status_code == 422
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    assert "lamamba_images_total 1.0" in text
    assert "lamamba_e2e_request_latency_seconds_count 1.0" in text
    for stage in ("queue", "denoise", "decode", "encode"):
        assert f'lamamba_stage_latency_seconds_count{{stage="{stage}"}} 1.0' in text
    assert 'lamamba_num_requests_running{device="cpu"} 0.0' in text
    assert 'lamamba_num_requests_waiting{device="cpu"} 0.0' in text
    assert "lamamba_images_per_second 1.0" in text
    assert 'lamamba_requests_total{route="/generate",status="200"} 1.0' in text
    assert 'lamamba_rejections_total{code="invalid_field"} 1.0' in text


def test_two_apps_of_one_process_share_nothing(client_of: ClientFactory) -> None:
    first, second = client_of(), client_of()
    first.post("/generate", json=BODY)
    assert "lamamba_images_total 1.0" in first.get("/metrics").text
    assert "lamamba_images_total 0.0" in second.get("/metrics").text


def test_sigterm_finishes_accepted_work_while_probes_say_draining() -> None:
    pipeline = fake_pipeline()
    settings = Settings(port=0)
    app = create_app(settings, (pipeline,))
    server = DrainingServer(app, settings)
    network: Any = pipeline.network
    gate = threading.Event()

    async def converse(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.001)
            before = await client.get("/version")
            in_flight = asyncio.Event()
            loop = asyncio.get_running_loop()

            def wait_for_the_signal() -> None:
                loop.call_soon_threadsafe(in_flight.set)
                gate.wait(TIMEOUT_S)

            network.before_call = wait_for_the_signal
            request = asyncio.create_task(client.post("/generate", json=BODY))
            await in_flight.wait()
            server.handle_exit(signal.SIGTERM, None)
            ready, live = await client.get("/health/ready"), await client.get("/health/live")
            assert (await client.get("/health/startup")).status_code == 200
            refused = await client.post("/generate", json=BODY)
            gate.set()
            accepted = await request
            assert accepted.status_code == 200
            # Else a client that keeps its connection would be refused here, beside servers that work.
            assert [answer.headers["connection"] for answer in (refused, accepted)] == ["close", "close"]
            assert "connection" not in before.headers
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert live.status_code == 200
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")

    asyncio.run(talk_until_the_end(server, converse))


def test_a_connection_without_a_request_is_closed_and_one_with_a_request_is_not() -> None:
    pipeline = fake_pipeline()
    settings = Settings(port=0, body_timeout_s=1.0)
    server = DrainingServer(create_app(settings, (pipeline,)), settings)
    network: Any = pipeline.network
    gate = threading.Event()

    async def fall_silent(port: int, head: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        with contextlib.suppress(ConnectionResetError):
            while await asyncio.wait_for(reader.read(4096), TIMEOUT_S):
                pass
        writer.close()

    async def converse(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.001)
            network.before_call = lambda: gate.wait(TIMEOUT_S)
            request = asyncio.create_task(client.post("/generate", json=BODY))
            half = b"GET /version HTTP/1.1\r\n"
            await asyncio.gather(
                *(fall_silent(port, head) for head in (b"", half, half + b"Host: x\r\n\r\nG"))
            )
            gate.set()
            assert (await request).status_code == 200
            server.handle_exit(signal.SIGTERM, None)

    asyncio.run(talk_until_the_end(server, converse))


def test_a_connection_that_is_used_again_is_not_closed() -> None:
    settings = Settings(port=0, body_timeout_s=5.0)
    server = DrainingServer(create_app(settings, (fake_pipeline(),)), settings)
    closed_at: list[int] = []
    now = 0
    used: Any = H11Protocol(server.config, server.server_state, {}, Mock(asyncio.AbstractEventLoop))
    used.transport = SimpleNamespace(is_closing=lambda: False, abort=lambda: closed_at.append(now))
    server.server_state.connections.add(used)
    for now in range(0, 60, 4):
        used.cycle = SimpleNamespace(response_complete=True)
        server._close_silent_connections(now)
    for now in range(57, 63):
        server._close_silent_connections(now)
    assert closed_at == [62]  # 56 was the last request


def test_work_that_a_drain_has_no_time_for_is_told_so() -> None:
    pipeline = fake_pipeline()
    settings = Settings(port=0, drain_timeout_s=0.1)
    server = DrainingServer(create_app(settings, (pipeline,)), settings)
    started = threading.Event()

    def take_long() -> None:
        started.set()
        time.sleep(0.05)

    async def converse(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.001)
            pipeline.network.before_call = take_long  # type: ignore[attr-defined]
            request = asyncio.create_task(client.post("/generate", json=BODY | {"steps": 1000}))
            await asyncio.to_thread(started.wait, TIMEOUT_S)
            server.handle_exit(signal.SIGTERM, None)
            answer = await request
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")

    asyncio.run(talk_until_the_end(server, converse))


async def talk_until_the_end(
    server: DrainingServer, converse: Callable[[int], Coroutine[Any, Any, None]]
) -> None:
    """Serve on a free port, which `converse` is given, until the server ends by itself."""
    with bind_socket("127.0.0.1", 0) as bound:
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        await asyncio.wait_for(converse(bound.getsockname()[1]), TIMEOUT_S)
        await asyncio.wait_for(serving, TIMEOUT_S)


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"port: cannot listen on 127.0.0.1:{port} \(Address already"):
            bind_socket("127.0.0.1", port)


def test_of_two_servers_that_start_at_once_one_gets_the_port() -> None:
    with bind_socket("127.0.0.1", 0) as first, pytest.raises(StartupError, match="Address already in use"):
        bind_socket("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("host", [".", "a" * 64], ids=["empty-label", "long-label"])
def test_a_host_that_cannot_be_a_name_is_one_line(host: str) -> None:
    with pytest.raises(StartupError, match=rf"^host: {re.escape(host)} given; it has no address \(.*\)$"):
        bind_socket(host, 0)


def test_a_model_that_cannot_be_loaded_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="no-such-folder: no such model folder"):
        run_server(Settings(port=0, models=("./no-such-folder",)))


def test_a_dead_engine_answers_what_is_open_and_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = fake_pipeline()
    app = create_app(Settings(port=0), (pipeline,))
    monkeypatch.setattr("service.server.create_app", lambda settings: app)
    answers: list[httpx.Response] = []

    def die() -> None:
        raise SystemExit("the device is lost")

    async def serve(server: DrainingServer, sockets: list[socket.socket]) -> None:
        serving = asyncio.create_task(server.serve(sockets=sockets))
        while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.001)
        pipeline.network.before_call = die  # type: ignore[attr-defined]
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/generate"
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            answers.append(await client.post(url, json=BODY))
        await asyncio.wait_for(serving, TIMEOUT_S)

    monkeypatch.setattr(DrainingServer, "run", lambda server, sockets: asyncio.run(serve(server, sockets)))
    with pytest.raises(EngineFailure, match="the engine has died: the device is lost"):
        run_server(Settings(port=0))
    assert [answer.status_code for answer in answers] == [503]


def test_probes_that_answer_503_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = fake_pipeline()
    pipeline.network.failing_label = 0  # type: ignore[attr-defined]
    app = create_app(Settings(), (pipeline,))

    async def talk(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get(path)).status_code for path in ("/health/ready", "/health/live", "/absent")]

    with caplog.at_level("DEBUG", logger="service.access"):
        assert asyncio.run(with_client(app, talk)) == [503, 503, 404]
    levels = [record.levelname for record in caplog.records if record.name == "service.access"]
    assert levels == ["DEBUG", "DEBUG", "INFO"]


def test_an_app_that_loads_first_is_ready_from_the_start_or_does_not_start(tmp_path: Path) -> None:
    apps = []

    async def status(settings: Settings) -> int:
        app = create_app(settings, load_first=True)
        apps.append(app)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return (await client.get("/health/ready")).status_code

    folder = save_tiny_model(tmp_path)
    assert asyncio.run(status(Settings(models=(str(folder),), device="cpu"))) == 200
    with pytest.raises(StartupError, match="no-such-folder: no such model folder"):
        asyncio.run(status(Settings(models=("./no-such-folder",), device="cpu")))
    for app in apps:  # its threads end with it
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            app.state.runtime.encoders.submit(print)
