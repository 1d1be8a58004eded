"""POST /v1/images/generations: what /generate does, in the shape of OpenAI's Images API."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from service.api.answering import CLIENT_CLOSED_REQUEST, ERROR_STATUSES, Answer, attended
from service.api.deps import ClientIdentity, ReadyRuntime, RequestId
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
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from service.engine.engine import Engine
    from service.engine.request import ImageJob

__all__ = ["router"]

router = APIRouter(tags=["generation"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorBody} for status in (*ERROR_STATUSES, "default") if status != 422
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
    runtime: ReadyRuntime,
    request_id: RequestId,
    client: ClientIdentity,
) -> Response:
    """Generate images: JSON in base64, or with `stream` one `image_generation.completed` event an image.

    A failure after the first byte of a stream is an `error` event.
    """
    started = time.monotonic()
    catalog, engine = runtime.catalog, runtime.engine
    try:
        wanted = body.as_generate_request(catalog.accepted(body.model))
        generation = catalog.resolve(wanted, request_id)
    except InvalidField as error:
        raise openai_invalid_field(error, body) from error
    with runtime.rate_limits.spending(client, generation.num_images):
        ticket = engine.submit(generation)
    answer = Answer(
        runtime=runtime,
        ticket=ticket,
        model=catalog.model(ticket.request.model),
        format=wanted.format or "png",
        quality=wanted.quality,
        started=started,
    )
    if body.stream:
        return _EventStream(engine, answer)
    response = await attended(request.receive, engine, ticket, _response(answer))
    return response or Response(status_code=CLIENT_CLOSED_REQUEST)


async def _response(answer: Answer) -> Response:
    images = await answer.images()
    answer.timings()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(answer.runtime.encoders, _as_json, answer, images)


def _as_json(answer: Answer, images: list[bytes]) -> Response:
    data = [_image(answer, job, image) for job, image in zip(answer.ticket.jobs, images, strict=True)]
    body = {"created": int(time.time()), "data": data, **_common(answer), **answer.facts()}
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
    side = answer.model.pipeline.resolution
    return {
        "background": "opaque",
        "output_format": answer.format,
        "size": f"{side}x{side}",
        "usage": _USAGE,
    }


class _EventStream(StreamingResponse):
    """Server-sent events, for as long as the client is there to read them."""

    def __init__(self, engine: Engine, answer: Answer) -> None:
        # nginx would keep events back until it has a buffer full of them.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(answer), media_type="text/event-stream", headers=headers)
        self._engine = engine
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await attended(receive, self._engine, self._answer.ticket, self.stream_response(send))


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    """An event for each image, in the request's order."""
    images = [asyncio.create_task(answer.image(job)) for job in answer.ticket.jobs]
    try:
        for job, image in zip(answer.ticket.jobs, images, strict=True):
            facts = {"created_at": int(time.time()), "quality": "auto", **_common(answer), **answer.facts()}
            yield _event("image_generation.completed", facts | _image(answer, job, await image))
        answer.timings()
    except ServiceError as error:
        yield _event("error", openai_error(error)[1])
    finally:
        for image in images:
            image.cancel()
        await asyncio.gather(*images, return_exceptions=True)


def _event(kind: str, data: dict[str, Any]) -> bytes:
    text = json.dumps({"type": kind} | data, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n".encode("ascii")
