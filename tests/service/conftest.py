"""Servers with fake models for the tests of the HTTP interface, and clients that leave them."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from model.pipeline import LaMambaPipeline
from service.app import create_app
from service.settings import Settings
from tests.fakes import fake_pipeline
from tests.service.engine_requests import TIMEOUT_S

ClientFactory = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """A server hides what it finds from the garbage collector, which has to find it again after the test."""
    yield
    gc.unfreeze()


@pytest.fixture
def client_of() -> Iterator[ClientFactory]:
    """Makes clients of servers, each with its own models and settings; the servers end with the test."""
    with ExitStack() as stack:

        def make(*pipelines: LaMambaPipeline, **settings: Any) -> TestClient:
            app = create_app(Settings(**settings), pipelines or (fake_pipeline(),))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of two models at 16 and 32 pixels, shared by the tests of a file that do not disturb it."""
    app = create_app(Settings(), (fake_pipeline(), fake_pipeline("fake-32", resolution=32)))
    with TestClient(app, raise_server_exceptions=False) as shared:
        yield shared


async def with_client(app: FastAPI, talk: Callable[[httpx.AsyncClient], Any]) -> Any:
    """Run the app's lifespan around a conversation, without a network."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        return await asyncio.wait_for(talk(client), TIMEOUT_S)


async def post_and_leave(
    app: FastAPI, path: str, body: dict[str, Any], leave: asyncio.Event, headers: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What a client is sent that closes its connection when `leave` is set."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [
            (name.encode(), value.encode())
            for name, value in {"content-type": "application/json", **(headers or {})}.items()
        ],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    await app(scope, receive, send)  # type: ignore[arg-type]
    return sent


async def leave_at_third_step(
    app: FastAPI, network: Any, path: str, body: dict[str, Any]
) -> list[dict[str, Any]]:
    """What a client is sent that leaves during the third step, which ends when the app has noticed it."""
    loop, leave, noticed = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    calls_before = len(network.rows_of_calls)

    def at_each_step() -> None:
        if len(network.rows_of_calls) - calls_before == 2:
            loop.call_soon_threadsafe(leave.set)
            noticed.wait(TIMEOUT_S)

    network.before_call = at_each_step
    sent = await post_and_leave(app, path, body, leave)
    noticed.set()
    return sent
