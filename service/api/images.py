"""POST /v1/images/generations: what /generate does, in the shape of OpenAI's Images API."""

from __future__ import annotations

import base64
import time
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

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
from service.api.events import EventStream, EventWatcher, Finished, PreviewImage, event, updates
from service.api.openai import (
    ImagesRequest,
    ImagesResponse,
    OpenAIErrorBody,
    openai_error,
    openai_invalid_field,
)
from service.api.responses import AsciiJSONResponse
from service.errors import InvalidField, ServiceError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from service.engine.request import ImageJob

__all__ = ["router"]

router = APIRouter(tags=["generation"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorBody} for status in (*ERROR_STATUSES, "default")
}
_ERRORS["default"]["description"] = "Any other error, in the same shape."
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@router.post(
    "/v1/images/generations",
    summary="Generate images of a class, in OpenAI's shape",
    response_model=ImagesResponse,
    responses=_ERRORS
    | {200: {"content": {"text/event-stream": {}}, "description": "The images, as JSON or as events."}},
)
async def generate_images(
    body: ImagesRequest,
    request: Request,
    context: GivenContext,
) -> Response:
    """Generate images: JSON in base64, or with `stream` events: `image_generation.completed` for each
    image, and before it as many `image_generation.partial_image` as `partial_images` says.

    A failure after the first byte of a stream is an `error` event.
    """
    started = time.monotonic()
    runtime = context.runtime
    with _in_fields_of(body):
        wanted = body.as_generate_request(partial(runtime.catalog.accepted, body.model))
        await refuse_unknown_label(runtime, wanted)

    def accepted(watcher: EventWatcher | None = None) -> Answer:
        with _in_fields_of(body):
            return accept(
                *(runtime, context.client, wanted, context.request_id),
                format=wanted.format or "png",
                quality=wanted.quality,
                started=started,
                trace=begin_trace(request, runtime, started=started),
                watcher=watcher,
            )

    if body.stream:
        refuse_streamed(context.idempotency_key)
        watcher = EventWatcher()
        answer = accepted(watcher=watcher)
        return EventStream(answer, _events(answer, watcher), error_event=_error_event)

    async def make() -> Response:
        with closing(accepted()) as answer:
            return await answer.written(_as_json)

    return await respond(request, runtime, make, key=context.idempotency_key, content=wanted)


@contextmanager
def _in_fields_of(body: ImagesRequest) -> Iterator[None]:
    """Errors about a field of `/generate` as ones about the field of `body` that it came from."""
    try:
        yield
    except InvalidField as error:
        raise openai_invalid_field(error, body) from error


def _as_json(answer: Answer, images: Sequence[bytes]) -> Response:
    answer.timings()  # for the metrics: OpenAI's shape has no place for them
    data = [_image(answer, job, image) for job, image in zip(answer.ticket.jobs, images, strict=True)]
    body = {"created": int(time.time()), "data": data, **_common(answer), "usage": _USAGE, **answer.facts()}
    return AsciiJSONResponse(body)


def _image(answer: Answer, job: ImageJob, image: bytes) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(image).decode("ascii"),
        "revised_prompt": answer.class_label,
        "seed": job.request.seed,
        "image_index": job.image_index,
    }


def _common(answer: Answer) -> dict[str, Any]:
    """What OpenAI says both of an answer and of an event."""
    side = answer.model.resolution
    return {
        "background": "opaque",
        "output_format": answer.format,
        "size": f"{side}x{side}",
    }


async def _events(answer: Answer, watcher: EventWatcher) -> AsyncIterator[bytes | None]:
    """Partial images as they are made, and a completed event for each image, in the request's order."""
    async for update in updates(answer, watcher, full_size=True):
        if isinstance(update, PreviewImage):
            number = {"partial_image_index": update.preview.index}
            yield _event("image_generation.partial_image", answer, update.preview.job, update.file, number)
        elif isinstance(update, Finished):
            yield _event("image_generation.completed", answer, update.job, update.file, {"usage": _USAGE})
        elif update is None:
            yield None
    answer.timings()


def _event(kind: str, answer: Answer, job: ImageJob, file: bytes, more: dict[str, Any]) -> bytes:
    facts = {"type": kind, "created_at": int(time.time()), "quality": "auto"}
    return event(kind, facts | _common(answer) | answer.facts() | _image(answer, job, file) | more)


def _error_event(error: ServiceError) -> dict[str, Any]:
    return {"type": "error"} | openai_error(error)[1]
