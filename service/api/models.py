"""GET /v1/models: what is served, in the shape of OpenAI's list, ascending by id; GET /v1/models/{id}: one of
them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from service.api.deps import ReadyRuntime
from service.api.schemas import ErrorBody

if TYPE_CHECKING:
    from service.runtime import Runtime

__all__ = ["router"]

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="The models and their limits", responses={503: {"model": ErrorBody}})
async def list_models(runtime: ReadyRuntime) -> dict[str, Any]:
    """Every loaded model: OpenAI's fields, its classes, what it runs on, and what it accepts."""
    return {"object": "list", "data": [_with_rows(model, runtime) for model in runtime.catalog.describe()]}


@router.get(
    "/v1/models/{model_id}",
    summary="One model and its limits",
    responses={status: {"model": ErrorBody} for status in (404, 422, 503)},
)
async def show_model(model_id: str, runtime: ReadyRuntime) -> dict[str, Any]:
    """The model of that id, as the list has it."""
    return _with_rows(runtime.catalog.find(model_id).describe(), runtime)


def _with_rows(model: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    """`max_rows` is the engines', which all models share."""
    return model | {"max_rows": runtime.max_rows}
