"""The process around the app: the socket, uvicorn, and what signals do.

SIGTERM or SIGINT   readiness goes false and new requests get 503, while probes are still answered and
                    accepted work is finished, for at most `drain_timeout_s`; then the process ends with 0
a second one        ends it at once

A connection on which no request comes in the time that a body has is closed: the process has only so many,
and probes need one too.

A process whose models cannot be loaded, or whose engine has died, fails its liveness, answers what is open
and ends with an error, so that whoever supervises it starts another.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.messages import one_line
from service.app import create_app
from service.errors import StartupError
from service.runtime import RuntimeState

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from service.runtime import Runtime
    from service.settings import Settings

__all__ = ["DrainingServer", "bind_socket", "run_server"]

_GRACE_S = 10  # for answers that are made and still being sent

_logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Uvicorn, but for the end: it drains before it closes its sockets, and a signal is not raised again
    after it.

    Uvicorn would stop listening at once, which fails the probes of a process that still works, and would
    end it by the signal instead of with exit code 0.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # whose connections are looked at here
                ws="none",
                log_config=None,
                access_log=False,  # ours names the request id
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._runtime: Runtime = app.state.runtime
        self._runtime.supervised = True
        self._drain_timeout_s = settings.drain_timeout_s
        self._drain_until: float | None = None
        self._head_timeout_s = settings.body_timeout_s
        self._silent: dict[H11Protocol, tuple[object, float]] = {}
        """Connections without a request: their last one, and since when."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal, end at the second."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._drain_timeout_s
            self._runtime.drain()
        else:
            self.should_exit = self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Give up what the time to drain was too short for, which uvicorn would cancel without an answer."""
        await self._runtime.give_up()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether the server is to close."""
        if self._runtime.state is RuntimeState.FAILED:
            self.should_exit = True
        if self._drain_until is not None and (self._runtime.idle or time.monotonic() > self._drain_until):
            self.should_exit = True
        if counter % 10 == 0:
            self._close_silent_connections(time.monotonic())
        return await super().on_tick(counter)

    def _close_silent_connections(self, now: float) -> None:
        before, self._silent = self._silent, {}
        for connection in self.server_state.connections:
            if not isinstance(connection, H11Protocol) or connection.transport.is_closing():
                continue
            last = connection.cycle
            if last is not None and not last.response_complete:
                continue
            known, since = before.get(connection, (last, now))
            if known is last and now - since > self._head_timeout_s:
                connection.transport.abort()
            else:
                self._silent[connection] = last, since if known is last else now


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at the address. Raises StartupError with the reason where there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name of the domain name system
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise StartupError(f"host: {host} given; it has no address ({reason})") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()  # uvicorn would a little later, and until then another server can have the address too
    except OSError as error:
        bound.close()
        raise StartupError(f"port: cannot listen on {host}:{port} ({error.strerror})") from error
    bound.set_inheritable(True)
    return bound


def run_server(settings: Settings) -> None:
    """Serve until a signal.

    Raises StartupError if a model cannot be loaded or the address is taken, EngineFailure if the engine has
    died on the way.
    """
    with bind_socket(settings.host, settings.port) as bound:
        host, port = bound.getsockname()[:2]
        app = create_app(settings)
        _logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        DrainingServer(app, settings).run(sockets=[bound])
        runtime: Runtime = app.state.runtime
        runtime.check_alive()
