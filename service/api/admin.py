"""/admin/models: which models are served, changed while requests come. Only with an admin key; without one in
the settings there are no such paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from service.api.authentication import given_key, unauthorized
from service.api.deps import ReadyRuntime
from service.api.schemas import AdminModel, AdminModelList, ErrorBody

if TYPE_CHECKING:
    from service.api_keys import KeyRing
    from service.model_control import ModelStatus

__all__ = ["admin_router"]


def admin_router(keys: KeyRing) -> APIRouter:
    """The routes, for whoever has one of the keys."""

    async def authorize(request: Request) -> None:  # a coroutine as those of deps are
        key = given_key(request.headers)
        if key is None or keys.name_of(key) is None:
            raise unauthorized("admin key", key_given=key is not None)

    router = APIRouter(
        prefix="/admin",
        tags=["administration"],
        dependencies=[
            Depends(authorize),
            Security(HTTPBearer(auto_error=False)),  # for the schema and its page
            Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
        ],
    )

    def errors(*statuses: int) -> dict[int | str, dict[str, object]]:
        return {status: {"model": ErrorBody} for status in (401, *statuses, 500, 503)}

    @router.get("/models", summary="The models that are loaded or could be", responses=errors())
    async def list_models(runtime: ReadyRuntime) -> AdminModelList:
        """Each with its state, and with what new requests get."""
        return AdminModelList(data=[_shown(status) for status in await runtime.models.statuses()])

    @router.post(
        "/models/{name}/load",
        summary="Load a model, or its new version",
        responses=errors(404, 409, 422, 507),
    )
    async def load_model(name: str, runtime: ReadyRuntime) -> AdminModel:
        """Answered when requests get it. A model that is loaded is read anew beside itself and then swapped:
        accepted requests are finished with the old weights, later ones get the new, and none fails.

        A load that fails changes nothing. 409: another load goes on, or two versions of the model are kept.
        422: the folder is no model that this server can run. 507: no memory for it.
        """
        _ = runtime.engine  # which takes no requests while the server ends
        return _shown(await runtime.models.load(name))

    @router.post("/models/{name}/unload", summary="Unload a model", responses=errors(404, 409, 422))
    async def unload_model(name: str, runtime: ReadyRuntime) -> AdminModel:
        """Accepted requests are finished, later ones get the answer of an unknown model.

        409: it is the only model, or it is being loaded.
        """
        return _shown(runtime.models.unload(name))

    return router


def _shown(status: ModelStatus) -> AdminModel:
    served = status.served
    return AdminModel(
        id=status.name,
        state=status.state,
        version=None if served is None else served.version,
        weights_hash=None if served is None else served.pipeline.weights_hash,
        resolution=None if served is None else served.pipeline.resolution,
        retiring=dict(status.retiring_images),
        last_error=status.last_error,
    )
