"""POST /generate: validated request -> engine -> encoded images -> bytes or JSON."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from model.images import MEDIA_TYPES
from service.api.answering import (
    ERROR_STATUSES,
    Answer,
    accept,
    begin_trace,
    refuse_streamed,
    refuse_unknown_label,
    respond,
)
from service.api.deps import GivenContext
from service.api.events import (
    EventStream,
    EventWatcher,
    Finished,
    PreviewImage,
    Progress,
    Queued,
    event,
    updates,
)
from service.api.negotiate import negotiate
from service.api.responses import AsciiJSONResponse, error_body
from service.api.schemas import ErrorBody, GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

__all__ = ["FACT_HEADERS", "router"]

FACT_HEADERS: Final = (
    *(
        "Model",
        "Class-Id",
        "Class-Label",
        "Cfg-Scale",
        "Guidance-Interval",
        "Resolution",
        "Steps",
        "Sampler",
        "Seed",
        "Image-Index",
    ),
)
"""What follows `X-LaMamba-` in the names of the headers of an image."""

router = APIRouter(tags=["generation"])

_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in ERROR_STATUSES}


@router.post(
    "/generate",
    summary="Generate images of a class",
    response_model=GenerateResponse,
    responses=_ERRORS
    | {
        200: {
            "content": {media_type: {} for media_type in (*MEDIA_TYPES.values(), "text/event-stream")},
            "description": "The images, or events: `queued`, `progress`, `preview`, then `result` with the "
            "JSON or `error`.",
        }
    },
)
async def generate(
    body: GenerateRequest,
    request: Request,
    context: GivenContext,
) -> Response:
    """Generate images: bytes if `Accept` names an image type and there is one image, else JSON in base64.

    With `Accept: text/event-stream` events tell of the way there, and the last holds the JSON, or the error.
    """
    started = time.monotonic()
    runtime = context.runtime
    representation = negotiate(request.headers.get("accept", ""), body)
    await refuse_unknown_label(runtime, body)
    accepted = partial(
        accept,
        *(runtime, context.client, body, context.request_id),
        format=representation.format,
        quality=body.quality,
        started=started,
        trace=begin_trace(request, runtime, started=started),
    )
    if representation.as_events:
        refuse_streamed(context.idempotency_key)
        watcher = EventWatcher()
        answer = accepted(watcher=watcher)
        return EventStream(
            answer, _events(answer, watcher), error_event=lambda error: error_body(error, context.request_id)
        )

    async def make() -> Response:
        with closing(accepted()) as answer:
            return await answer.written(_as_bytes if representation.as_bytes else _as_json)

    return await respond(request, runtime, make, key=context.idempotency_key, content=(body, representation))


async def _events(answer: Answer, watcher: EventWatcher) -> AsyncIterator[bytes | None]:
    """What happens on the way, then the result."""
    images: list[bytes] = []
    steps = answer.ticket.request.num_inference_steps
    async for update in updates(answer, watcher, full_size=False):
        if isinstance(update, Queued):
            yield event("queued", {"queue_position": update.position})
        elif isinstance(update, Progress):
            yield event("progress", {"steps": steps, "steps_done": update.steps_done})
        elif isinstance(update, PreviewImage):
            yield event("preview", _preview(answer, update))
        elif isinstance(update, Finished):
            images.append(update.file)
        else:
            yield None
    loop = asyncio.get_running_loop()
    result = await loop.run_in_executor(answer.runtime.encoders, _as_json, answer, images)
    yield b"event: result\ndata: " + bytes(result.body) + b"\n\n"


def _preview(answer: Answer, update: PreviewImage) -> dict[str, Any]:
    preview = update.preview
    return {
        "index": answer.ticket.jobs.index(preview.job),
        "preview_index": preview.index,
        "steps_done": preview.steps_done,
        "format": "png",
        "b64_json": base64.b64encode(update.file).decode("ascii"),
    }


def _as_bytes(answer: Answer, images: Sequence[bytes]) -> Response:
    """One image, the facts in `X-LaMamba-*` headers (percent-encoded), the timings in `Server-Timing`."""
    facts = answer.facts() | {"image_index": answer.ticket.request.image_index}
    headers = {
        f"X-LaMamba-{name.replace('_', '-').title()}": quote(_text(value), safe=" +")
        for name, value in facts.items()
        if value is not None
    }
    headers["Server-Timing"] = ", ".join(
        f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in answer.timings().items()
    )
    return Response(images[0], media_type=MEDIA_TYPES[answer.format], headers=headers)


def _text(value: object) -> str:
    """A fact as a header has it: two timesteps are 100-700."""
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _as_json(answer: Answer, images: Sequence[bytes]) -> Response:
    """All images in base64, with the facts and the timings."""
    request = answer.ticket.request
    timings = answer.timings()
    body = {
        "request_id": request.request_id,
        "created": int(time.time()),
        **answer.facts(),
        "seeds": [request.seed] * len(images),
        "format": answer.format,
        "images": [
            {
                "index": index,
                "seed": request.seed,
                "image_index": job.image_index,
                "b64_json": base64.b64encode(image).decode("ascii"),
            }
            for index, (job, image) in enumerate(zip(answer.ticket.jobs, images, strict=True))
        ],
        "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
    }
    return AsciiJSONResponse(body)
