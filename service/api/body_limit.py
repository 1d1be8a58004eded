"""A middleware that reads a request's body, as long as it is within the limit and comes in time.

The declared length is looked at first, then what really comes, chunked or not: the app behind gets the body
in one piece or not at all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from service.api.openai import speaks_openai
from service.api.responses import error_response
from service.errors import BodyTimeout, PayloadTooLarge, RequestError
from service.logs import request_id_variable

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.metrics import Metrics

__all__ = ["BodyLimitMiddleware"]


class BodyLimitMiddleware:
    """Answers 413 to a body over `max_bytes` and 408 to one that is not there after `timeout_s`."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            error: RequestError = BodyTimeout(f"body: not complete after {self._timeout_s:g} s")
        except PayloadTooLarge as too_large:
            error = too_large
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
            return
        self._metrics.count_error(error)
        response = error_response(error, request_id_variable.get(), openai=speaks_openai(scope))
        response.headers["Connection"] = "close"  # what is left of the body is not read
        await response(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if the client has gone."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            raise self._too_large(f"{declared[:20]} bytes")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large("more")
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self, given: str) -> PayloadTooLarge:
        return PayloadTooLarge(f"body: {given} given; this server accepts {self._max_bytes} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body first and then what the connection says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
