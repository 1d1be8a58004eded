"""Answers by their requests' `Idempotency-Key`: a request that is sent again is not made again.

    first request  ->  one shared task  ->  its answer, to everybody who waits for it; kept for a while
    the same again ->  joins the task, or gets the kept answer
    the key with other content -> IdempotencyKeyReused

A task ends when the last of those who wait for it leaves. Errors are not kept: the next try is a new one.
What is kept is bounded in number, bytes and time; what was not asked for longest goes first. Nothing outlives
the process. Used on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.responses import Response

from service.errors import IdempotencyKeyReused

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from service.metrics import Metrics

__all__ = ["REPLAYED_HEADER", "IdempotencyKey", "IdempotentAnswers"]

REPLAYED_HEADER: Final = "Idempotent-Replayed"
"""What an answer has that another request of the same key was made for."""


@dataclass(frozen=True, kw_only=True)
class IdempotencyKey:
    """A key and where it holds: the same key of another client, or for another route, is another one."""

    client: str
    route: str
    key: str


@dataclass(kw_only=True, eq=False)
class _Running:
    digest: bytes
    task: asyncio.Task[Response]
    num_waiting: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kept:
    digest: bytes
    response: Response
    num_bytes: int
    expires_at: float


class IdempotentAnswers:
    """The tasks that run and the answers that are kept."""

    def __init__(
        self,
        *,
        max_entries: int,
        max_bytes: int,
        ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `max_entries` 0 no answer is kept, and a request still joins the one that runs."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._clock = clock
        self._running: dict[IdempotencyKey, _Running] = {}
        self._kept: OrderedDict[IdempotencyKey, _Kept] = (
            OrderedDict()
        )  # the one asked for last is the last one
        self._num_bytes = 0

    async def answer(
        self, key: IdempotencyKey, content: object, make: Callable[[], Coroutine[Any, Any, Response]]
    ) -> Response:
        """What `make` returns, which is called unless the same request has been given before.

        `content` is what makes requests the same, by its repr. Raises IdempotencyKeyReused where it is not
        that of the key's first request, and what `make` raises.
        """
        digest = hashlib.sha256(repr(content).encode()).digest()
        self._forget_expired()
        kept, running = self._kept.get(key), self._running.get(key)
        known = kept or running
        if known is not None and known.digest != digest:
            raise IdempotencyKeyReused(
                f"Idempotency-Key: {key.key} given with another request before; a new request needs a new key"
            )
        if kept is not None:
            self._kept.move_to_end(key)
            self._metrics.idempotent_answers.labels("kept").inc()
            return _again(kept.response)
        if running is not None:
            self._metrics.idempotent_answers.labels("joined").inc()
            return _again(await self._wait(key, running))
        running = self._running[key] = _Running(digest=digest, task=asyncio.create_task(make()))
        running.task.add_done_callback(lambda _: self._settle(key, running))
        return await self._wait(key, running)

    async def _wait(self, key: IdempotencyKey, running: _Running) -> Response:
        running.num_waiting += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.num_waiting -= 1
            if not running.num_waiting and not running.task.done():
                del self._running[key]  # who comes now makes it anew
                running.task.cancel()
                await asyncio.gather(running.task, return_exceptions=True)

    def _settle(self, key: IdempotencyKey, running: _Running) -> None:
        if self._running.get(key) is not running:  # all had left
            return
        del self._running[key]
        if not running.task.cancelled() and running.task.exception() is None:
            self._keep(key, running.digest, running.task.result())

    def _keep(self, key: IdempotencyKey, digest: bytes, response: Response) -> None:
        headers = sum(len(name) + len(value) for name, value in response.raw_headers)
        num_bytes = len(response.body) + headers
        if not self._max_entries or num_bytes > self._max_bytes:
            return
        expires_at = self._clock() + self._ttl_s
        self._kept[key] = _Kept(
            digest=digest, response=_copy(response), num_bytes=num_bytes, expires_at=expires_at
        )
        self._num_bytes += num_bytes
        while len(self._kept) > self._max_entries or self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))

    def _forget_expired(self) -> None:
        now = self._clock()
        for key in [key for key, kept in self._kept.items() if kept.expires_at <= now]:
            self._forget(key)

    def _forget(self, key: IdempotencyKey) -> None:
        self._num_bytes -= self._kept.pop(key).num_bytes


def _copy(response: Response) -> Response:
    """The same answer with headers of its own: whoever sends one may add to them."""
    copy = Response(response.body, status_code=response.status_code)
    copy.raw_headers = list(response.raw_headers)
    return copy


def _again(response: Response) -> Response:
    copy = _copy(response)
    copy.headers[REPLAYED_HEADER] = "true"
    return copy
