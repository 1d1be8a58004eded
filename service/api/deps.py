"""What the routes are handed: the runtime of the app that they belong to, and the request's id."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from service.api.authentication import CLIENT, Client
from service.logs import request_id_variable
from service.runtime import Runtime

__all__ = ["ClientIdentity", "ReadyRuntime", "RequestId", "RuntimeOfApp"]


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def _ready_runtime(request: Request) -> Runtime:
    """The runtime once its models are loaded: without them there are no limits to look at a body by."""
    runtime = _runtime(request)
    _ = runtime.catalog
    return runtime


def _request_id() -> str:
    return request_id_variable.get()


def _client_identity(request: Request) -> str:
    """Whom limits are counted for."""
    client: Client = getattr(request.state, CLIENT)
    return client.identity


ClientIdentity = Annotated[str, Depends(_client_identity)]
RuntimeOfApp = Annotated[Runtime, Depends(_runtime)]
ReadyRuntime = Annotated[Runtime, Depends(_ready_runtime)]
RequestId = Annotated[str, Depends(_request_id)]
