"""Probes and metrics: /health/startup (wait for me until then), /health/live (restart me if not),
/health/ready (send me requests), /metrics, /version."""

from __future__ import annotations

from importlib.metadata import version
from platform import python_version

import torch
from fastapi import APIRouter, Response

from service.api.deps import RuntimeOfApp
from service.api.responses import AsciiJSONResponse
from service.api.schemas import ServedVersion, VersionInfo
from service.metrics import METRICS_CONTENT_TYPE
from service.runtime import RuntimeState

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get(
    "/health/startup", summary="Whether the process has started", responses={503: {"description": "Not yet."}}
)
async def startup(runtime: RuntimeOfApp) -> Response:
    """503 until the models are loaded and warm, or for good where that has failed; 200 from then on."""
    return AsciiJSONResponse({"status": runtime.state}, status_code=200 if runtime.started else 503)


@router.get(
    "/health/live", summary="Whether the process works", responses={503: {"description": "It does not."}}
)
async def live(runtime: RuntimeOfApp) -> Response:
    """503 once the engine's thread has died or a model could not be loaded: only a restart helps then."""
    state = runtime.state
    return AsciiJSONResponse({"status": state}, status_code=503 if state is RuntimeState.FAILED else 200)


@router.get(
    "/health/ready", summary="Whether requests are welcome", responses={503: {"description": "Not now."}}
)
async def ready(runtime: RuntimeOfApp) -> Response:
    """200 once the models are loaded and warm, 503 before, while draining, and after a failure."""
    state = runtime.state
    return AsciiJSONResponse({"status": state}, status_code=200 if state is RuntimeState.READY else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(runtime: RuntimeOfApp) -> Response:
    """All values in Prometheus' text format."""
    return Response(runtime.metrics.render(), media_type=METRICS_CONTENT_TYPE)


@router.get("/version", summary="The server's version")
async def show_version(runtime: RuntimeOfApp) -> VersionInfo:
    """The versions of this server and of its ground, and, once they are loaded, what the models run on."""
    models = runtime.catalog.models if runtime.started else ()
    return VersionInfo(
        version=version("lamamba"),
        python=python_version(),
        torch=torch.__version__,
        models=[
            ServedVersion(
                id=model.name,
                device=str(model.pipeline.device),
                dtype=str(model.pipeline.dtype).removeprefix("torch."),
                scan_backend=model.pipeline.scan_backend,
                weights_hash=model.pipeline.weights_hash,
            )
            for model in models
        ],
    )
