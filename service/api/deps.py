"""What the routes are handed: the runtime of the app that they belong to, who asks, and the request's ids.

All are coroutines, though they wait for nothing: FastAPI runs any other function in a thread, and under load
each such turn waits for the engines' threads.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import Depends, Header, Request

from service.api.authentication import CLIENT, Client
from service.errors import InvalidField
from service.idempotency import IdempotencyKey
from service.logs import request_id_variable
from service.runtime import Runtime

__all__ = ["ClientIdentity", "GivenIdempotencyKey", "ReadyRuntime", "RequestId", "RuntimeOfApp"]

# A string of structured fields (RFC 8941), as the header's draft has it, or bare, as most clients send it.
_KEY: Final = re.compile(r'([!#-~]{1,255})|"((?:[ !#-\[\]-~]|\\["\\]){1,255})"')


async def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


async def _ready_runtime(request: Request) -> Runtime:
    """The runtime once its models are loaded: without them there are no limits to look at a body by."""
    runtime = await _runtime(request)
    _ = runtime.catalog
    return runtime


async def _request_id() -> str:
    return request_id_variable.get()


async def _client_identity(request: Request) -> str:
    """Whom limits are counted for."""
    client: Client = getattr(request.state, CLIENT)
    return client.identity


ClientIdentity = Annotated[str, Depends(_client_identity)]


async def _idempotency_key(
    request: Request,
    client: ClientIdentity,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="A word that the client makes up for this request and repeats with its retries: what "
            "has been made, or is being made, is answered again. Not for event streams."
        ),
    ] = None,
) -> IdempotencyKey | None:
    """The key of the request. Raises InvalidField for one that is none, or for several."""
    if idempotency_key is None:
        return None
    given = request.headers.getlist("idempotency-key")
    match = _KEY.fullmatch(given[0].strip())
    if match is None or len(given) > 1:
        raise InvalidField(
            "Idempotency-Key", ", ".join(given), "one word of 1 to 255 ASCII characters", by="this server"
        )
    bare, quoted = match.groups()
    key = bare or re.sub(r"\\(.)", r"\1", quoted)
    return IdempotencyKey(client=client, route=request.scope["route"].path, key=key)


GivenIdempotencyKey = Annotated[IdempotencyKey | None, Depends(_idempotency_key)]
RuntimeOfApp = Annotated[Runtime, Depends(_runtime)]
ReadyRuntime = Annotated[Runtime, Depends(_ready_runtime)]
RequestId = Annotated[str, Depends(_request_id)]
