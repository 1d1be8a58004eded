"""GET /v1/classes: a model's classes by part of their id or label, or by a label nearly right."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query

from service.api.deps import ReadyRuntime
from service.api.responses import AsciiJSONResponse
from service.api.schemas import ClassList, ClassQuery, ErrorBody, ServedClass

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["find_classes", "router"]

router = APIRouter(tags=["models"])


@router.get(
    "/v1/classes",
    summary="Search the classes of a model",
    response_model=ClassList,
    responses={status: {"model": ErrorBody} for status in (422, 503)},
)
def list_classes(query: Annotated[ClassQuery, Query()], runtime: ReadyRuntime) -> AsciiJSONResponse:
    """Classes whose id or label contains `q`, then those whose label is close to it; without `q` all, by id.

    422 answers a field that is not there, a limit out of range, and a model or resolution that no loaded
    model has.
    """
    # Not async: likeness to a thousand labels can take 0.2 s, which a thread of FastAPI's spends.
    model = runtime.catalog.select(query.model, query.resolution)
    labels = model.pipeline.labels
    found = find_classes(labels, query.q)
    answer = ClassList(
        model=model.name,
        resolution=model.pipeline.resolution,
        total=len(found),
        data=[ServedClass(class_id=index, label=labels[index]) for index in found[: query.limit]],
    )
    return AsciiJSONResponse(answer.model_dump())


def find_classes(labels: Sequence[str], text: str) -> list[int]:
    """Ids that match: exactly, from the start, anywhere within, each ascending; then close labels, nearest
    first."""
    wanted = text.strip().casefold()
    names = [label.casefold() for label in labels]
    ranks = {index: _rank(wanted, (str(index), name)) for index, name in enumerate(names)}
    within = sorted((rank, index) for index, rank in ranks.items() if rank is not None)
    near: list[int] = []
    others: dict[str, list[int]] = {}
    for index, rank in ranks.items():
        if rank is None:
            others.setdefault(names[index], []).append(index)
    for name in difflib.get_close_matches(wanted, others, n=max(1, len(others))):
        near += others[name]
    return [index for _, index in within] + near


def _rank(wanted: str, names: tuple[str, ...]) -> int | None:
    """0 for one of the names itself, 1 for the start of one, 2 for a part of one, None for none of these."""
    if not wanted:
        return 2
    if wanted in names:
        return 0
    if any(name.startswith(wanted) for name in names):
        return 1
    return 2 if any(wanted in name for name in names) else None
