"""POST /generate: validated request -> engine -> encoded images -> bytes or JSON.

A client that leaves gives its slots back at the next step. Encoding runs in the runtime's pool, image by
image as the engine finishes them; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from model.images import MEDIA_TYPES, ImageFormat, encode_image, image_metadata
from service.api.deps import ReadyRuntime, RequestId
from service.api.negotiate import Representation, negotiate
from service.api.responses import AsciiJSONResponse
from service.api.schemas import ErrorBody, GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from service.catalog import ServedModel
    from service.engine.request import ImageJob, Ticket
    from service.runtime import Runtime

__all__ = ["router"]

router = APIRouter(tags=["generation"])

_CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it, but the log and the counter say so
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 408, 413, 415, 422, 429, 500, 503, 504)
}


@router.post(
    "/generate",
    summary="Generate images of a class",
    response_model=GenerateResponse,
    responses=_ERRORS
    | {
        200: {
            "content": {media_type: {} for media_type in MEDIA_TYPES.values()},
            "description": "The images.",
        }
    },
)
async def generate(
    body: GenerateRequest, request: Request, runtime: ReadyRuntime, request_id: RequestId
) -> Response:
    """Generate images: bytes if `Accept` names an image type and there is one image, else JSON in base64."""
    started = time.monotonic()
    representation = negotiate(request.headers.get("accept", ""), body)
    engine = runtime.engine
    ticket = engine.submit(runtime.catalog.resolve(body, request_id))
    answer = asyncio.create_task(_answer(runtime, ticket, representation, body.quality, started))
    departure = asyncio.create_task(_departure(request))
    try:
        await asyncio.wait((answer, departure), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return answer.result()
    finally:
        engine.cancel(ticket)
        answer.cancel()
        departure.cancel()


async def _departure(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(
    runtime: Runtime, ticket: Ticket, representation: Representation, quality: int, started: float
) -> Response:
    answer = _Answer(
        ticket=ticket, model=runtime.catalog.model(ticket.request.model), format=representation.format
    )
    loop = asyncio.get_running_loop()

    async def encoded(job: ImageJob) -> bytes:
        pixels = await asyncio.wrap_future(job.result)
        metadata = answer.metadata(job)
        return await loop.run_in_executor(
            runtime.encoders, encode_image, pixels, representation.format, quality, metadata
        )

    images = await asyncio.gather(*(encoded(job) for job in ticket.jobs))
    timings = _timings(runtime, ticket, time.monotonic() - started)
    if representation.as_bytes:
        return answer.as_bytes(images[0], timings)
    # 16 images in base64 are megabytes of text: the pool writes them out too.
    return await loop.run_in_executor(runtime.encoders, answer.as_json, images, timings)


def _timings(runtime: Runtime, ticket: Ticket, total: float) -> dict[str, float]:
    """Seconds by stage and in total. Encoding overlaps the other stages: what counts is what it adds."""
    timings = ticket.stage_seconds
    timings["encode"] = max(0.0, total - sum(timings.values()))
    for stage, seconds in timings.items():
        runtime.metrics.stage_latency.labels(stage).observe(seconds)
    runtime.metrics.e2e_request_latency.observe(total)
    return timings | {"total": total}


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What is said of a finished request, in a file's metadata, in headers, or in JSON."""

    ticket: Ticket
    model: ServedModel
    format: ImageFormat

    @property
    def class_label(self) -> str | None:
        """The label of the class, None for a model without classes."""
        return self.model.pipeline.labels[self.ticket.request.class_label] if self.model.conditional else None

    def metadata(self, job: ImageJob) -> dict[str, str]:
        """What the image's file carries."""
        return image_metadata(
            seed=job.request.seed,
            image_index=job.image_index,
            class_label=self.class_label,
            guidance_scale=job.request.guidance_scale,
            num_inference_steps=job.request.num_inference_steps,
            sampler=job.request.sampler,
            model=self.model.name,
            weights_hash=self.model.pipeline.weights_hash,
        )

    def facts(self) -> dict[str, Any]:
        """The settings that the images were made with, those that the request left open included."""
        request = self.ticket.request
        return {
            "model": self.model.name,
            "class_id": request.class_label if self.model.conditional else None,
            "class_label": self.class_label,
            "cfg_scale": request.guidance_scale,
            "resolution": self.model.pipeline.resolution,
            "steps": request.num_inference_steps,
            "sampler": request.sampler,
            "seed": request.seed,
        }

    def as_bytes(self, image: bytes, timings: dict[str, float]) -> Response:
        """One image, the facts in `X-LaMamba-*` headers (percent-encoded), the timings in `Server-Timing`."""
        facts = self.facts() | {"image_index": self.ticket.request.image_index}
        headers = {
            f"X-LaMamba-{name.replace('_', '-').title()}": quote(str(value), safe=" +")
            for name, value in facts.items()
            if value is not None
        }
        headers["Server-Timing"] = ", ".join(
            f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in timings.items()
        )
        return Response(image, media_type=MEDIA_TYPES[self.format], headers=headers)

    def as_json(self, images: list[bytes], timings: dict[str, float]) -> Response:
        """All images in base64, with the facts and the timings."""
        request = self.ticket.request
        body = {
            "request_id": request.request_id,
            "created": int(time.time()),
            **self.facts(),
            "seeds": [request.seed] * len(images),
            "format": self.format,
            "images": [
                {
                    "index": index,
                    "seed": request.seed,
                    "image_index": job.image_index,
                    "b64_json": base64.b64encode(image).decode("ascii"),
                }
                for index, (job, image) in enumerate(zip(self.ticket.jobs, images, strict=True))
            ],
            "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
        }
        return AsciiJSONResponse(body)
