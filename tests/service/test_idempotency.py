"""Idempotency-Key: if this fails, a retry after a lost answer costs another image, or brings a wrong one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import Response

from service.api_keys import key_hash
from service.app import create_app
from service.errors import IdempotencyKeyReused
from service.idempotency import REPLAYED_HEADER, IdempotencyKey, IdempotentAnswers
from service.metrics import Metrics
from service.settings import Settings
from tests.fakes import fake_pipeline
from tests.service.conftest import ClientFactory, post_and_leave

TIMEOUT_S = 30.0
OURS: dict[str, Any] = {"class_id": 2, "steps": 4}  # without a seed: two runs give two images
OPENAIS: dict[str, Any] = {"prompt": "forest", "steps": 4}
ROUTES = [
    pytest.param("/generate", OURS, id="ours"),
    pytest.param("/v1/images/generations", OPENAIS, id="openai"),
]


def images_made(client: TestClient) -> float:
    text = client.get("/metrics").text
    return float(
        next(line.split()[1] for line in text.splitlines() if line.startswith("lamamba_images_total"))
    )


def keyed(key: str, **headers: str) -> dict[str, str]:
    return {"Idempotency-Key": key, **headers}


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_retry_gets_the_first_answer_and_makes_nothing(
    client_of: ClientFactory, path: str, body: dict[str, Any]
) -> None:
    client = client_of(rate_limit_images_per_minute=1, max_images_per_request=1)
    first = client.post(path, json=body, headers=keyed("k1"))
    assert first.status_code == 200, first.text
    again = [client.post(path, json=body, headers=keyed(key)) for key in ("k1", '"k1"', " k1 ")]
    for answer in again:
        assert (answer.status_code, answer.content) == (200, first.content)
        assert answer.headers[REPLAYED_HEADER] == "true"
        assert answer.headers["x-request-id"] != first.headers["x-request-id"]
    assert REPLAYED_HEADER not in first.headers
    assert images_made(client) == 1
    assert client.post(path, json=body, headers=keyed("k2")).status_code == 429  # that one is a new request
    assert 'lamamba_idempotent_answers_total{source="kept"} 3.0' in client.get("/metrics").text


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_key_with_another_request_is_422(client_of: ClientFactory, path: str, body: dict[str, Any]) -> None:
    client = client_of()
    assert client.post(path, json=body, headers=keyed("k")).status_code == 200
    answer = client.post(path, json=body | {"steps": 3}, headers=keyed("k"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert "Idempotency-Key: k given with another request before" in answer.json()["error"]["message"]
    spelt_out = body | {"seed": None, "sampler": "dpm++"}  # the same once validated
    assert client.post(path, json=spelt_out, headers=keyed("k")).headers[REPLAYED_HEADER] == "true"


def test_what_is_answered_belongs_to_the_request(client_of: ClientFactory) -> None:
    client = client_of()
    first = client.post("/generate", json=OURS, headers=keyed("k", Accept="image/png"))
    again = client.post("/generate", json=OURS, headers=keyed("k", Accept="image/png, */*;q=0.1"))
    assert again.headers[REPLAYED_HEADER] == "true"
    assert again.headers["x-lamamba-seed"] == first.headers["x-lamamba-seed"]
    assert client.post("/generate", json=OURS, headers=keyed("k")).status_code == 422  # JSON


def test_a_key_is_the_clients_and_the_routes(client_of: ClientFactory) -> None:
    client = client_of(api_keys=f"a:{key_hash('one')},b:{key_hash('two')}")
    seeds = {
        client.post("/generate", json=OURS, headers=keyed("k", **{"X-API-Key": api_key})).json()["seed"]
        for api_key in ("one", "two", "one", "two")
    }
    assert len(seeds) == 2
    headers = keyed("k", **{"X-API-Key": "one"})
    assert client.post("/v1/images/generations", json=OPENAIS, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="empty"),
        pytest.param("two words", id="space"),
        pytest.param("x" * 256, id="long"),
        pytest.param('"open', id="open-quote"),
        pytest.param('""', id="nothing-quoted"),
        pytest.param("k\xfc", id="not-ascii"),
    ],
)
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_key_that_is_none_is_named(client: TestClient, path: str, body: dict[str, Any], key: str) -> None:
    answer = client.post(path, json=body, headers={"Idempotency-Key": key.encode("latin-1")})  # type: ignore[dict-item]
    assert answer.status_code == (422 if path == "/generate" else 400)
    assert answer.json()["error"]["message"].startswith("Idempotency-Key: ")
    assert "accepts one word of 1 to 255 ASCII characters" in answer.json()["error"]["message"]


def test_two_keys_are_none(client: TestClient) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert client.post("/generate", json=OURS, headers=headers).status_code == 422


def test_an_event_stream_has_no_key(client: TestClient) -> None:
    ours = client.post("/generate", json=OURS, headers=keyed("k", Accept="text/event-stream"))
    openais = client.post("/v1/images/generations", json=OPENAIS | {"stream": True}, headers=keyed("k"))
    assert (ours.status_code, openais.status_code) == (422, 400)
    for answer in (ours, openais):
        assert answer.json()["error"]["message"] == (
            'Idempotency-Key: "k" given; this request accepts none with an event stream, which is sent once'
        )


def test_an_error_does_not_stick(client_of: ClientFactory) -> None:
    pipeline = fake_pipeline()
    client = client_of(pipeline)
    network: Any = pipeline.network
    network.failing_label = 2
    assert client.post("/generate", json=OURS, headers=keyed("k")).status_code == 500
    network.failing_label = None
    answer = client.post("/generate", json=OURS, headers=keyed("k"))
    assert answer.status_code == 200
    assert REPLAYED_HEADER not in answer.headers


class Crowd:
    """Clients of an app that leave when they are told to; the network waits until the gate is open."""

    def __init__(self, app: FastAPI, network: Any) -> None:
        self.app = app
        self.entered, self.gate = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            loop.call_soon_threadsafe(self.entered.set)
            self.gate.wait(TIMEOUT_S)

        network.before_call = wait

    async def ask(self, leave: asyncio.Event) -> int:
        """The status that was sent."""
        sent = await post_and_leave(self.app, "/generate", OURS, leave, {"idempotency-key": "k"})
        return sent[0].get("status", 0)


def with_crowd(talk: Callable[[Crowd, httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        pipeline = fake_pipeline()
        app = create_app(Settings(), (pipeline,))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            crowd = Crowd(app, pipeline.network)
            await asyncio.wait_for(talk(crowd, client), TIMEOUT_S)
            assert not app.state.runtime.idempotent_answers._running

    asyncio.run(run())


async def joined(client: httpx.AsyncClient, count: int) -> None:
    while f'source="joined"}} {count}.0' not in (await client.get("/metrics")).text:  # noqa: ASYNC110 - no event
        await asyncio.sleep(0.001)


def test_a_retry_joins_the_first_while_it_runs_and_outlives_it() -> None:
    async def talk(crowd: Crowd, client: httpx.AsyncClient) -> None:
        leave, stay = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(crowd.ask(leave))
        await crowd.entered.wait()
        others = [asyncio.create_task(crowd.ask(stay)) for _ in range(3)]
        await joined(client, 3)
        leave.set()
        assert await first == 499
        crowd.gate.set()
        assert await asyncio.gather(*others) == [200] * 3
        text = (await client.get("/metrics")).text
        assert "lamamba_images_total 1.0" in text
        assert "lamamba_cancellations_total 0.0" in text

    with_crowd(talk)


def test_the_work_ends_when_the_last_one_leaves() -> None:
    async def talk(crowd: Crowd, client: httpx.AsyncClient) -> None:
        leave = asyncio.Event()
        asking = [asyncio.create_task(crowd.ask(leave)) for _ in range(3)]
        await joined(client, 2)
        leave.set()
        assert await asyncio.gather(*asking) == [499] * 3
        assert crowd.app.state.runtime.idle
        assert "lamamba_cancellations_total 1.0" in (await client.get("/metrics")).text
        crowd.gate.set()
        answer = await client.post("/generate", json=OURS, headers=keyed("k"))
        assert answer.status_code == 200
        assert REPLAYED_HEADER not in answer.headers

    with_crowd(talk)


# --- the store alone ---


def store(**limits: Any) -> IdempotentAnswers:
    limits = {"max_entries": 10, "max_bytes": 10_000, "ttl_s": 60.0, "metrics": Metrics()} | limits
    return IdempotentAnswers(**limits)


def key(name: str) -> IdempotencyKey:
    return IdempotencyKey(client="c", route="/", key=name)


def ask(answers: IdempotentAnswers, *names: str, body: bytes = b"body") -> list[bool]:
    """Whether each was answered by an earlier request."""

    async def make() -> Response:
        return Response(body)

    async def run() -> list[bool]:
        replies = []
        for name in names:
            replies.append(await answers.answer(key(name), "content", make))
            await asyncio.sleep(0)  # what is answered is kept in the next turn of the loop
        return [REPLAYED_HEADER in reply.headers for reply in replies]

    return asyncio.run(run())


def test_answers_are_kept_for_a_time() -> None:
    now = [0.0]
    answers = store(ttl_s=10.0, clock=lambda: now[0])
    assert ask(answers, "a") == [False]
    now[0] = 9.9
    assert ask(answers, "a") == [True]
    now[0] = 10.0
    assert ask(answers, "a", "a") == [False, True]


def test_the_least_recently_asked_for_goes_first() -> None:
    answers = store(max_entries=2)
    assert ask(answers, "a", "b", "a", "c", "a", "b") == [False, False, True, False, True, False]
    assert len(answers._kept) == 2


def test_kept_bytes_are_bounded_and_too_large_an_answer_is_not_kept() -> None:
    answers = store(max_bytes=1000)
    assert ask(answers, "a", "b", "a", "b", body=b"x" * 600) == [False] * 4
    assert ask(answers, "b", body=b"x" * 600) == [True]
    assert ask(answers, "c", "c", body=b"x" * 1001) == [False, False]
    assert ask(answers, "b", body=b"x" * 600) == [True]
    assert answers._num_bytes == sum(kept.num_bytes for kept in answers._kept.values()) <= 1000


def test_without_entries_nothing_is_kept() -> None:
    answers = store(max_entries=0)
    assert ask(answers, "a", "a") == [False, False]
    assert not answers._kept


def test_who_adds_headers_to_an_answer_adds_them_to_no_other() -> None:
    answers = store()

    async def make() -> Response:
        return Response(b"body")

    async def run() -> None:
        first = await answers.answer(key("a"), 1, make)
        first.headers["Vary"] = "Origin"
        await asyncio.sleep(0)
        again = await answers.answer(key("a"), 1, make)
        again.headers["Vary"] = "Origin"
        assert "Vary" not in (await answers.answer(key("a"), 1, make)).headers
        with pytest.raises(IdempotencyKeyReused):
            await answers.answer(key("a"), 2, make)

    asyncio.run(run())
