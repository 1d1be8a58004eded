"""What the routes are handed: the runtime of the app that they belong to, who asks, and the request's ids.

All are coroutines, though they wait for nothing: FastAPI runs any other function in a thread, and under load
each such turn waits for the engines' threads. What the routes that make images need is one dependency, for
each costs the event loop a twentieth of a millisecond.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Header, Request

from service.api.authentication import CLIENT, Client
from service.errors import InvalidField
from service.idempotency import IdempotencyKey
from service.logs import request_id_variable
from service.runtime import Runtime

__all__ = ["GenerationContext", "GivenContext", "ReadyRuntime", "RuntimeOfApp"]

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


@dataclass(frozen=True, kw_only=True)
class GenerationContext:
    """What a request for images is made with, beside its body."""

    runtime: Runtime
    request_id: str
    client: str
    """Whom limits are counted for."""
    idempotency_key: IdempotencyKey | None


async def _generation_context(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="A word that the client makes up for this request and repeats with its retries: what "
            "has been made, or is being made, is answered again. Not for event streams."
        ),
    ] = None,
) -> GenerationContext:
    """Raises InvalidField for an idempotency key that is none, or for several."""
    runtime = await _ready_runtime(request)
    client: Client = getattr(request.state, CLIENT)
    return GenerationContext(
        runtime=runtime,
        request_id=request_id_variable.get(),
        client=client.identity,
        idempotency_key=None if idempotency_key is None else _idempotency_key(request, client),
    )


def _idempotency_key(request: Request, client: Client) -> IdempotencyKey:
    given = request.headers.getlist("idempotency-key")
    match = _KEY.fullmatch(given[0].strip())
    if match is None or len(given) > 1:
        raise InvalidField(
            "Idempotency-Key", ", ".join(given), "one word of 1 to 255 ASCII characters", by="this server"
        )
    bare, quoted = match.groups()
    key = bare or re.sub(r"\\(.)", r"\1", quoted)
    return IdempotencyKey(client=client.identity, route=request.scope["route"].path, key=key)


GivenContext = Annotated[GenerationContext, Depends(_generation_context)]
ReadyRuntime = Annotated[Runtime, Depends(_ready_runtime)]
RuntimeOfApp = Annotated[Runtime, Depends(_runtime)]
