"""Requests sent to a server, and what became of each.

    open loop     each request is sent when it comes, however many are unanswered: what users do
    closed loop   a fixed number is always unanswered: the next is sent when one is answered, which keeps a
                  server saturated without overfilling its queue

A latency counts from when a request should have come, so that what holds the generator up is not hidden.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx

from service.benchmark.arrivals import PlannedRequest
from service.benchmark.mix import MixEntry

__all__ = ["OK", "Outcome", "check_server", "closed_loop", "open_loop"]

OK: Final = "200"
_CHECK_STEPS = 2
_CHECK_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request's end. Times in seconds from the start of the run."""

    entry: MixEntry
    at_s: float
    """When it should have come."""
    sent_s: float
    done_s: float
    status: str
    """The HTTP status, or the name of the client's error."""
    timings: dict[str, float] = field(default_factory=dict)
    """The server's own, by stage; empty where it tells none."""

    @property
    def ok(self) -> bool:
        """Whether there is an image."""
        return self.status == OK

    @property
    def latency_s(self) -> float:
        """From when it should have come to its answer."""
        return self.done_s - self.at_s


Report = Callable[[Outcome], None]


def check_server(url: str, mix: Sequence[MixEntry]) -> None:
    """Ask for one short image of each entry.

    Raises ValueError, with the server's words, where it does not answer or does not accept one.
    """
    with httpx.Client(timeout=_CHECK_LIMIT_S, trust_env=False) as client:
        for entry in mix:
            body = entry.body(seed=0) | {"steps": min(entry.steps, _CHECK_STEPS)}
            try:
                response = client.post(f"{url}/generate", json=body)
            except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise ValueError(f"url: {url} given; no server answers there ({error})") from error
            if response.status_code != 200:
                raise ValueError(
                    f"{entry.label}: the server answers {response.status_code}: {_words(response)}"
                )


async def open_loop(
    url: str, planned: Sequence[PlannedRequest], *, timeout_s: float, report: Report = lambda outcome: None
) -> list[Outcome]:
    """Send each request at its time; the outcomes in order of arrival."""
    async with _client(timeout_s) as client:
        started = time.perf_counter()
        tasks: list[asyncio.Task[Outcome]] = []
        async with asyncio.TaskGroup() as group:
            for request in planned:
                await asyncio.sleep(max(0.0, started + request.at_s - time.perf_counter()))
                tasks.append(group.create_task(_send(client, url, request, started, report)))
    return [task.result() for task in tasks]


async def closed_loop(
    url: str,
    planned: Sequence[PlannedRequest],
    *,
    concurrency: int,
    timeout_s: float,
    max_seconds: float,
    report: Report = lambda outcome: None,
) -> list[Outcome]:
    """Keep `concurrency` requests unanswered, none sent after `max_seconds`; the outcomes as answered.

    When the planned requests come is not heeded.
    """
    outcomes: list[Outcome] = []
    waiting = iter(planned)
    async with _client(timeout_s) as client:
        started = time.perf_counter()

        async def send_in_turn() -> None:
            for request in waiting:
                now = time.perf_counter() - started
                if now > max_seconds:
                    return
                outcomes.append(await _send(client, url, replace(request, at_s=now), started, report))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send_in_turn())
    return outcomes


def _client(timeout_s: float) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)


async def _send(
    client: httpx.AsyncClient, url: str, request: PlannedRequest, started: float, report: Report
) -> Outcome:
    sent_s = time.perf_counter() - started
    timings: dict[str, float] = {}
    try:
        response = await client.post(f"{url}/generate", json=request.body)
        status = str(response.status_code)
        done_s = time.perf_counter() - started
        if status == OK:
            timings = response.json().get("timings", {})
    except httpx.TransportError as error:
        status, done_s = type(error).__name__, time.perf_counter() - started
    outcome = Outcome(
        entry=request.entry, at_s=request.at_s, sent_s=sent_s, done_s=done_s, status=status, timings=timings
    )
    report(outcome)
    return outcome


def _words(response: httpx.Response) -> Any:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not our kind of server
        return response.text[:200]
