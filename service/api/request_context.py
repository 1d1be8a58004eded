"""The outermost middleware: a request's id, its log record and count, and the last resort for what nobody
caught.

The id is the client's `X-Request-ID` where that is one word of sane characters, else a new one. Every
answer carries it, every record logged on the way names it.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from service.api.authentication import CLIENT
from service.api.openai import speaks_openai
from service.api.responses import error_response
from service.errors import ServiceError
from service.logs import request_id_variable

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.metrics import Metrics

__all__ = ["RequestContextMiddleware"]

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = "/health/"
_METRICS = "/metrics"

_logger = logging.getLogger("service.access")


class RequestContextMiddleware:
    """Wraps an app; pure ASGI, so that routes still see their client disconnect.

    Answers while `ending` holds close their connection: a client that keeps it would try again here, where a
    new one, behind a balancer of connections, leads to a server that takes its request.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, ending: Callable[[], bool]) -> None:
        self._app = app
        self._metrics = metrics
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else secrets.token_hex(12)
        token = request_id_variable.set(request_id)
        scope["state"] = dict(scope.get("state", {}))
        status = 0
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"  # bytes are what their type says
                if self._ending():
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # a defect of ours: the client gets an id, the log the trace
            _logger.exception("unhandled error on %s", scope["path"])
            error = ServiceError("internal error; the server's log has the reason under this id")
            self._metrics.count_error(error)
            if status == 0:
                response = error_response(error, request_id, openai=speaks_openai(scope))
                await response(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.monotonic() - started)
            request_id_variable.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # the template, so that its values are few
        self._metrics.requests.labels(route, str(status)).inc()
        path = scope["path"]
        # A probe's 503 is its answer: while models load it would fill the log.
        quiet = path.startswith(_PROBES) or (path == _METRICS and status < 500)
        level = logging.DEBUG if quiet else logging.INFO
        client = scope.get("state", {}).get(CLIENT)
        # The name alone: neither a key nor an address, which is personal data in many places.
        named = {} if client is None or client.key_name is None else {"api_key": client.key_name}
        facts = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
        _logger.log(level, "%(method)s %(path)s %(status)d in %(seconds).3f s", facts, extra=facts | named)
