"""A middleware that asks for an API key, where the server has any, and says who a client is.

A key comes as `Authorization: Bearer KEY` or `X-API-Key: KEY`. What needs none is listed here: whatever is
not listed needs one, unknown paths included. The body of a request without a key is not read.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers

from service.api.openai import speaks_openai
from service.api.paths import route_path
from service.api.responses import error_response
from service.errors import Unauthorized
from service.logs import request_id_variable

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from service.api_keys import KeyRing
    from service.metrics import Metrics

__all__ = ["CLIENT", "AuthenticationMiddleware", "Client", "given_key", "unauthorized"]

CLIENT: Final = "client"
"""Where in a scope's state the client stands."""

_OPEN_PATHS: Final = frozenset(
    {"/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/metrics", "/version", "/favicon.ico"}
)
_OPEN_FOLDERS: Final = ("/health/", "/web/", "/admin/")  # the last one has a key of its own
_MAX_READ_ADDRESSES: Final = 1024  # which are not read again: most requests come from where others did


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who asks: by the name of a key, else by address."""

    key_name: str | None
    address: str

    @property
    def identity(self) -> str:
        """What limits are counted by; a name cannot pass for an address, nor the other way round."""
        return f"address:{self.address}" if self.key_name is None else f"key:{self.key_name}"


class AuthenticationMiddleware:
    """Answers 401 to whoever has no key, and leaves a `Client` in the scope's state."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = given_key(Headers(scope=scope)) if self._keys else None
        name = None if key is None else self._keys.name_of(key)
        host = (scope.get("client") or ("unknown", 0))[0]
        scope["state"][CLIENT] = Client(key_name=name, address=_address(host))
        if name is not None:
            self._metrics.api_key_requests.labels(name).inc()
        if self._keys and name is None and not _open(route_path(scope)):
            await self._refuse(scope, receive, send, key_given=key is not None)
            return
        await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, *, key_given: bool) -> None:
        error = unauthorized("api key", key_given=key_given)
        self._metrics.count_error(error)
        response = error_response(error, request_id_variable.get(), openai=speaks_openai(scope))
        await response(scope, receive, send)


def _open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS)


def unauthorized(kind: str, *, key_given: bool) -> Unauthorized:
    """What is said to whoever has no key of a kind."""
    return Unauthorized(
        f"{kind}: one that this server does not know given; ask its operator for one"
        if key_given
        else f"{kind}: none given; this server accepts Authorization: Bearer KEY, or X-API-Key: KEY",
        key_given=key_given,
    )


def given_key(headers: Headers) -> str | None:
    """The key that a request comes with."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


@lru_cache(maxsize=_MAX_READ_ADDRESSES)
def _address(host: str) -> str:
    """The client's address; of IPv6 the /64, which is what one customer has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name, such as a test's or a Unix socket's
        return host
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:  # as a socket for both versions has it, in a /64 of all of IPv4
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
