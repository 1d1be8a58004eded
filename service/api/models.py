"""GET /v1/models: what is served, in the shape of OpenAI's list, ascending by id; GET /version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter

from service.api.deps import ReadyRuntime

__all__ = ["router"]

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="The models and their limits")
async def list_models(runtime: ReadyRuntime) -> dict[str, Any]:
    """Every loaded model: OpenAI's fields, its classes, what it runs on, and what it accepts."""
    return {"object": "list", "data": runtime.catalog.describe()}


@router.get("/version", summary="The server's version")
async def show_version() -> dict[str, str]:
    """The version of the installed package."""
    return {"version": version("lamamba")}
