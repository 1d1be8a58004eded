"""From a ticket to encoded images, for every route that makes them, and what is said of a finished request.

A client that leaves gives its slots back at the next step. Encoding runs in the runtime's pool, image by
image as the engine finishes them; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.responses import Response

from model.images import ImageFormat, encode_image, image_metadata
from service.errors import InvalidField
from service.futures import mark_seen

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request
    from starlette.types import Receive

    from service.api.schemas import GenerateRequest
    from service.catalog import ModelFacts
    from service.engine.group import EngineGroup
    from service.engine.request import ImageJob, Ticket, Watcher
    from service.idempotency import IdempotencyKey
    from service.runtime import Runtime
    from service.tracing import RequestTrace

__all__ = [
    "ERROR_STATUSES",
    "Answer",
    "accept",
    "attended",
    "begin_trace",
    "refuse_streamed",
    "refuse_unknown_label",
    "respond",
]

_CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's; nobody is left to read it, but the log and the counter say so."""
ERROR_STATUSES: Final = (400, 408, 413, 415, 422, 429, 500, 503, 504)
"""What a route that makes images can answer beside 200."""

_Result = TypeVar("_Result")


async def attended(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """What `work` returns, or None if the client leaves first; then `work` is cancelled and has ended."""
    answer = asyncio.create_task(work)
    departure = asyncio.create_task(_departure(receive))
    try:
        await asyncio.wait((answer, departure), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        departure.cancel()
        await asyncio.gather(answer, departure, return_exceptions=True)


async def respond(
    request: Request,
    runtime: Runtime,
    make: Callable[[], Coroutine[Any, Any, Response]],
    *,
    key: IdempotencyKey | None,
    content: object,
) -> Response:
    """What `make` returns, for as long as the client waits; with a key, made once for the same `content`."""
    work = make() if key is None else runtime.idempotent_answers.answer(key, content, make)
    response = await attended(request.receive, work)
    return response or Response(status_code=_CLIENT_CLOSED_REQUEST)


def refuse_streamed(key: IdempotencyKey | None) -> None:
    """Raise InvalidField if there is a key: a stream is gone once it has been read."""
    if key is not None:
        raise InvalidField(
            "Idempotency-Key",
            key.key,
            "none with an event stream, which is sent once",
            by="this request",
        )


async def refuse_unknown_label(runtime: Runtime, body: GenerateRequest) -> None:
    """Raise what `accept` would for a text that names no class, whose search for near labels would hold up
    the event loop.
    """
    model = runtime.catalog.select(body.model, body.resolution)
    if isinstance(body.class_id, str) and model.pipeline.label_index(body.class_id) is None:
        await asyncio.to_thread(model.class_label, body.class_id)


async def _departure(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A request's images in the making, and what is said of it: in a file's metadata, in headers, in JSON."""

    runtime: Runtime
    engine: EngineGroup
    ticket: Ticket
    model: ModelFacts
    format: ImageFormat
    quality: int
    started: float
    """`time.monotonic()` at the request's arrival."""
    trace: RequestTrace | None

    def close(self) -> None:
        """Give up what is not finished."""
        self.engine.cancel(self.ticket)
        if self.trace is not None:
            self.trace.end(self.ticket)

    @property
    def class_label(self) -> str | None:
        """The label of the class, None for a model without classes."""
        return self.model.labels[self.ticket.request.class_label] if self.model.labels else None

    def metadata(self, job: ImageJob) -> dict[str, str]:
        """What the image's file carries."""
        return image_metadata(
            seed=job.request.seed,
            image_index=job.image_index,
            class_label=self.class_label,
            guidance_scale=job.request.guidance_scale,
            guidance_interval=job.request.guidance_interval,
            num_inference_steps=job.request.num_inference_steps,
            sampler=job.request.sampler,
            model=self.model.name,
            weights_hash=self.model.weights_hash,
        )

    def facts(self) -> dict[str, Any]:
        """The settings that the images were made with, those that the request left open included."""
        request = self.ticket.request
        return {
            "model": self.model.name,
            "class_id": request.class_label if self.model.labels else None,
            "class_label": self.class_label,
            "cfg_scale": request.guidance_scale,
            "guidance_interval": request.guidance_interval,
            "resolution": self.model.resolution,
            "steps": request.num_inference_steps,
            "sampler": request.sampler,
            "seed": request.seed,
        }

    async def image(self, job: ImageJob) -> bytes:
        """One image's file, as soon as its pixels are there."""
        # Shielded: who stops waiting closes the ticket, which the engine would not notice of a single job.
        result = asyncio.shield(asyncio.wrap_future(job.result))
        result.add_done_callback(mark_seen)  # the images of a request fail together, and one of them is told
        pixels = await result
        return await asyncio.get_running_loop().run_in_executor(
            self.runtime.encoders, encode_image, pixels, self.format, self.quality, self.metadata(job)
        )

    async def images(self) -> list[bytes]:
        """All files, in order."""
        return await asyncio.gather(*(self.image(job) for job in self.ticket.jobs))

    def timings(self) -> dict[str, float]:
        """Seconds by stage and in total, once all images are there; they are counted in the metrics.

        Encoding overlaps the other stages: what counts is what it adds.
        """
        total = time.monotonic() - self.started
        timings = self.ticket.stage_seconds
        timings["encode"] = max(0.0, total - sum(timings.values()))
        metrics = self.runtime.metrics
        for stage, seconds in timings.items():
            metrics.stage_latency.labels(stage).observe(seconds)
        metrics.e2e_request_latency.observe(total)
        return timings | {"total": total}


def begin_trace(request: Request, runtime: Runtime, *, started: float) -> RequestTrace | None:
    """The trace of a request that came at `started`; None where nobody wants any."""
    if runtime.tracing is None:
        return None
    return runtime.tracing.begin(request.scope["route"].path, request.headers, started=started)


def accept(
    runtime: Runtime,
    client: str,
    body: GenerateRequest,
    request_id: str,
    *,
    format: ImageFormat,
    quality: int,
    started: float,
    trace: RequestTrace | None = None,
    watcher: Watcher | None = None,
) -> Answer:
    """Hand a request to the engine; whoever gets the answer closes it.

    What the request means and who makes it is settled in one go: models come and go between two turns of the
    event loop. Raises InvalidField, or what says that the client or everybody has to wait, before any work.
    """
    catalog = runtime.catalog
    generation = catalog.resolve(body, request_id)
    engine = runtime.engine
    with runtime.rate_limits.spending(client, generation.num_images):
        ticket = engine.submit(generation, watcher)
    return Answer(
        runtime=runtime,
        engine=engine,
        ticket=ticket,
        model=catalog.model(generation.model).facts,
        format=format,
        quality=quality,
        started=started,
        trace=trace,
    )
