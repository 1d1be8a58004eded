"""The application factory: settings in, an ASGI app out. Nothing is loaded before its lifespan starts."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from service.api import classes, generate, health, images, models
from service.api.admin import admin_router
from service.api.authentication import AuthenticationMiddleware
from service.api.body_limit import BodyLimitMiddleware
from service.api.generate import FACT_HEADERS
from service.api.handlers import add_error_handlers
from service.api.openai import OpenAIErrorBody
from service.api.page import add_page
from service.api.request_context import RequestContextMiddleware
from service.api.schemas import ErrorBody
from service.api_keys import KeyRing, parse_key_hashes, read_key_file
from service.errors import StartupError
from service.idempotency import REPLAYED_HEADER
from service.runtime import Runtime
from service.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import ModuleType

    from service.engine.pipeline import ServedPipeline

__all__ = ["create_app"]

# For the schema and its page alone: the middleware is what looks at keys.
_KEY_SCHEMES = [
    Security(HTTPBearer(auto_error=False)),
    Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
]

_CORS_REQUEST_HEADERS = ["Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "X-Request-ID"]
_CORS_ANSWER_HEADERS = [
    *("X-Request-ID", "Retry-After", "Server-Timing", REPLAYED_HEADER),
    *(f"X-LaMamba-{name}" for name in FACT_HEADERS),
]


def create_app(
    settings: Settings | None = None,
    pipelines: Sequence[ServedPipeline] | None = None,
    *,
    load_first: bool = False,
) -> FastAPI:
    """The server as an ASGI app.

    Args:
        settings: None reads them from the environment (`uvicorn --factory service.app:create_app`).
        pipelines: loaded models to serve instead of those that the settings name. With them the app is ready
            when its lifespan has started; without, the models load while it answers its probes.
        load_first: its lifespan has started only when the models have loaded, and fails with them: for a host
            that sends requests from then on.
    """
    settings = settings if settings is not None else load_settings()
    runtime = Runtime(settings, pipelines)
    keys = _key_ring(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        start = asyncio.create_task(runtime.start())
        try:
            if load_first or pipelines is not None:
                await start
            if load_first:
                runtime.check_alive()
            yield
            await start
        finally:
            await runtime.stop()

    app = FastAPI(
        title="LaMamba",
        summary="Class-conditional image generation with LaMamba-Diff.",
        version=version("lamamba"),
        lifespan=lifespan,
        root_path=settings.root_path,
    )
    app.state.runtime = runtime
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
        metrics=runtime.metrics,
    )
    app.add_middleware(AuthenticationMiddleware, keys=keys, metrics=runtime.metrics)
    app.add_middleware(RequestContextMiddleware, metrics=runtime.metrics, ending=lambda: runtime.ending)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_ANSWER_HEADERS,
        )
    for resource in (generate, images, models, classes):
        app.include_router(
            resource.router,
            dependencies=_KEY_SCHEMES if keys else None,
            responses={401: _unauthorized(resource)} if keys else None,
        )
    app.include_router(health.router)
    if settings.admin_key:
        app.include_router(admin_router(_admin_key_ring(settings, keys)))
    add_page(app)
    return app


def _key_ring(settings: Settings) -> KeyRing:
    """The keys of both settings. Raises StartupError where the file is not as it should be."""
    hashes = settings.api_keys
    if settings.api_keys_file is not None:
        further = read_key_file(settings.api_keys_file)
        if twice := sorted(hashes.keys() & further.keys()):
            raise StartupError(f"api_keys_file: the name {twice[0]} is in LAMAMBA_API_KEYS too")
        hashes = hashes | further
    return KeyRing(hashes)


def _admin_key_ring(settings: Settings, api_keys: KeyRing) -> KeyRing:
    """The admin key. Raises StartupError for one that clients have too."""
    hashes = parse_key_hashes([settings.admin_key])
    if api_keys.has_any_of(hashes.values()):
        raise StartupError("admin_key: a value that is not shown given; it is the key of a client too")
    return KeyRing(hashes)


def _unauthorized(resource: ModuleType) -> dict[str, Any]:
    """How the schema describes the 401 of a resource's routes."""
    return {"model": OpenAIErrorBody if resource is images else ErrorBody}
