"""Requests sent to a server, and what became of each.

    open loop     each request is sent when it comes, however many are unanswered: what users do
    closed loop   a fixed number is always unanswered: the next is sent when one is answered, which keeps a
                  server saturated without overfilling its queue

A latency counts from when a request should have come, so that what holds the generator up is not hidden.
A client that tries again does so where the request may be sent once more: what was not answered, and 429, 502
and 503, with which servers and balancers say that there is no image.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any, Final, Self

import httpx

from service.benchmark.arrivals import PlannedRequest
from service.benchmark.mix import MixEntry

__all__ = ["OK", "Outcome", "Report", "check_server", "closed_loop", "open_loop"]

OK: Final = "200"
_RETRIED: Final = ("429", "502", "503")
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
    request_ids: tuple[str, ...] = ()
    """The `X-Request-ID` of each try; the status is the last one's."""

    @property
    def ok(self) -> bool:
        """Whether there is an image."""
        return self.status == OK

    @property
    def tries(self) -> int:
        """How often it was sent."""
        return len(self.request_ids)

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
    url: str,
    planned: Sequence[PlannedRequest],
    *,
    timeout_s: float,
    retry_s: float | None = None,
    report: Report = lambda outcome: None,
) -> list[Outcome]:
    """Send each request at its time; the outcomes in order of arrival.

    `retry_s`: seconds after which a request without an image is tried again, until `timeout_s` have passed;
    None: one try.
    """
    async with _Clients(timeout_s) as clients:
        started = time.perf_counter()
        tasks: list[asyncio.Task[Outcome]] = []
        async with asyncio.TaskGroup() as group:
            for request in planned:
                await asyncio.sleep(max(0.0, started + request.at_s - time.perf_counter()))
                sending = _send(clients, url, request, started, report, retry_s, timeout_s)
                tasks.append(group.create_task(sending))
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
    async with _Clients(timeout_s) as clients:
        started = time.perf_counter()

        async def send_in_turn() -> None:
            for request in waiting:
                now = time.perf_counter() - started
                if now > max_seconds:
                    return
                outcomes.append(await _send(clients, url, replace(request, at_s=now), started, report))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send_in_turn())
    return outcomes


class _Clients:
    """Clients with one connection each, as many as requests are unanswered at once.

    One client would look at all of its connections, once for each of them, whenever one is taken or given
    back: with a hundred that costs more than all else, and the load would be limited by who makes it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ssl_context = httpx.create_ssl_context(trust_env=False)
        self._idle: list[httpx.AsyncClient] = []  # the one used last is the last one
        self._all = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._all.aclose()

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client that nobody else uses meanwhile."""
        client = self._idle.pop() if self._idle else await self._all.enter_async_context(self._new())
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=self._timeout_s, verify=self._ssl_context, trust_env=False)


async def _send(
    clients: _Clients,
    url: str,
    request: PlannedRequest,
    started: float,
    report: Report,
    retry_s: float | None = None,
    timeout_s: float = 0.0,
) -> Outcome:
    sent_s = time.perf_counter() - started
    request_ids: list[str] = []
    while True:
        request_ids.append(token_hex(8))
        status, timings = await _try(clients, url, request, request_ids[-1])
        done_s = time.perf_counter() - started
        again = status in _RETRIED or not status.isdigit()
        if retry_s is None or not again or done_s + retry_s > sent_s + timeout_s:
            break
        await asyncio.sleep(retry_s)
    outcome = Outcome(
        entry=request.entry,
        at_s=request.at_s,
        sent_s=sent_s,
        done_s=done_s,
        status=status,
        timings=timings,
        request_ids=tuple(request_ids),
    )
    report(outcome)
    return outcome


async def _try(
    clients: _Clients, url: str, request: PlannedRequest, request_id: str
) -> tuple[str, dict[str, float]]:
    """Status, or the name of the client's error, and the server's timings."""
    headers = {"x-request-id": request_id}
    try:
        async with clients.lent() as client:
            response = await client.post(f"{url}/generate", json=request.body, headers=headers)
    except httpx.TransportError as error:
        return type(error).__name__, {}
    status = str(response.status_code)
    return status, response.json().get("timings", {}) if status == OK else {}


def _words(response: httpx.Response) -> Any:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not our kind of server
        return response.text[:200]
