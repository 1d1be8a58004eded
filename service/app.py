"""The application factory: settings in, an ASGI app out. Nothing is loaded before its lifespan starts."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.responses import RedirectResponse

from service.api import classes, generate, health, images, models
from service.api.body_limit import BodyLimitMiddleware
from service.api.handlers import add_error_handlers
from service.api.request_context import RequestContextMiddleware
from service.runtime import Runtime
from service.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from service.engine.pipeline import ServedPipeline

__all__ = ["create_app"]


def create_app(
    settings: Settings | None = None, pipelines: Sequence[ServedPipeline] | None = None
) -> FastAPI:
    """The server as an ASGI app.

    Args:
        settings: None reads them from the environment (`uvicorn --factory service.app:create_app`).
        pipelines: loaded models to serve instead of those that the settings name. With them the app is ready
            when its lifespan has started; without, the models load while it answers its probes.
    """
    settings = settings if settings is not None else load_settings()
    runtime = Runtime(settings, pipelines)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        start = asyncio.create_task(runtime.start())
        if pipelines is not None:
            await start
        yield
        await start
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
        BodyLimitMiddleware, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(RequestContextMiddleware, metrics=runtime.metrics)
    for resource in (generate, images, models, classes, health):
        app.include_router(resource.router)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    return app


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("docs")
