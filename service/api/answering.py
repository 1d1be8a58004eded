"""From a ticket to encoded images, for every route that makes them, and what is said of a finished request.

A client that leaves gives its slots back at the next step. Encoding runs in the runtime's pool, image by
image as the engine finishes them; the event loop only waits. It is one thread for all requests and engines,
so the threads hand an answer on to each other and wake it once, with the whole response:

    decoder's thread --pixels--> thread of the pool: file, and after the last one the response --> event loop
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.responses import Response

from model.images import ImageFormat, encode_image, image_metadata
from service.errors import InvalidField
from service.futures import mark_seen

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    import numpy as np
    from numpy.typing import NDArray
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
    departure.add_done_callback(lambda _: answer.cancel())
    try:
        return await answer
    except asyncio.CancelledError:
        if departure.done() and answer.cancelled():
            return None
        raise
    finally:
        departure.cancel()


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

    def encode(self, job: ImageJob, pixels: NDArray[np.uint8]) -> bytes:
        """The file of an image; takes a while."""
        return encode_image(pixels, self.format, self.quality, self.metadata(job))

    async def image(self, job: ImageJob) -> bytes:
        """One image's file, as soon as its pixels are there."""
        # Shielded: who stops waiting closes the ticket, which the engine would not notice of a single job.
        result = asyncio.shield(asyncio.wrap_future(job.result))
        result.add_done_callback(mark_seen)  # the images of a request fail together, and one of them is told
        pixels = await result
        return await asyncio.get_running_loop().run_in_executor(
            self.runtime.encoders, self.encode, job, pixels
        )

    async def written(self, write: Callable[[Answer, Sequence[bytes]], Response]) -> Response:
        """What `write` makes of all files, in order; called in a thread of the pool."""
        return await asyncio.wrap_future(_Writing(self, write).response)

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


class _Writing:
    """An answer on its way through the pool's threads, with nobody to wait between them."""

    def __init__(self, answer: Answer, write: Callable[[Answer, Sequence[bytes]], Response]) -> None:
        self.response: Future[Response] = Future()
        self._answer = answer
        self._write = write
        self._files: dict[ImageJob, bytes] = {}
        self._lock = threading.Lock()
        for job in answer.ticket.jobs:
            job.result.add_done_callback(partial(self._made, job))

    def _made(self, job: ImageJob, result: Future[NDArray[np.uint8]]) -> None:
        """Called in the thread that has made the image, failed or given it up."""
        try:
            self._answer.runtime.encoders.submit(self._encode, job, result.result())
        except CancelledError:
            self.response.cancel()
        except Exception as error:  # the images of a request fail together, and the first one is told
            self._fail(error)

    def _encode(self, job: ImageJob, pixels: NDArray[np.uint8]) -> None:
        if self.response.done():  # failed or given up
            return
        try:
            file = self._answer.encode(job, pixels)
            with self._lock:
                self._files[job] = file
                complete = len(self._files) == len(self._answer.ticket.jobs)
            if complete:
                response = self._write(self._answer, [self._files[job] for job in self._answer.ticket.jobs])
                with contextlib.suppress(InvalidStateError):
                    self.response.set_result(response)
        except Exception as error:  # a defect of ours, or no memory for a file: nobody else hears of it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # somebody has been told, or nobody waits
            self.response.set_exception(error)


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
