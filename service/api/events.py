"""Server-sent events of a request on its way, for every route that streams.

    engine's thread --EventWatcher--> event loop: Queued, Progress, PreviewImage, Finished, ... --> one
    writer a route, which gives them their names and shapes

The engine only wakes the loop. What a slow client has not yet read is not queued: steps and places are read
when there is something to write, and only previews are kept, at most those that its request asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import StreamingResponse

from model.images import encode_preview
from service.api.answering import attended
from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from starlette.types import Receive, Scope, Send

    from service.api.answering import Answer
    from service.engine.request import ImageJob, Preview
    from service.metrics import Metrics

__all__ = [
    "EventStream",
    "EventWatcher",
    "Finished",
    "PreviewImage",
    "Progress",
    "Queued",
    "event",
    "updates",
]

_KEEP_ALIVE_S: Final = 15.0  # proxies close what is silent for a minute
_KEEP_ALIVE: Final = b": still here\n\n"


class EventWatcher:
    """Hears of a request in the engine's thread and wakes its event loop; made in a coroutine."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.previews: deque[Preview] = deque()
        self._loop = asyncio.get_running_loop()

    def changed(self, previews: Sequence[Preview]) -> None:
        """Called in the engine's thread."""
        self.previews.extend(previews)
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to hear of it
            self._loop.call_soon_threadsafe(self.woken.set)


@dataclass(frozen=True)
class Queued:
    """No image has started."""

    position: int
    """1 for the request that is next."""


@dataclass(frozen=True)
class Progress:
    """Steps are done."""

    steps_done: tuple[int, ...]
    """Of each image."""


@dataclass(frozen=True)
class PreviewImage:
    """A preview, encoded."""

    preview: Preview
    file: bytes


@dataclass(frozen=True)
class Finished:
    """An image, encoded; they come in the request's order."""

    job: ImageJob
    file: bytes


async def updates(
    answer: Answer, watcher: EventWatcher, *, full_size: bool
) -> AsyncGenerator[Queued | Progress | PreviewImage | Finished | None, None]:
    """What happens to a request until its last image is there; None where nothing has for a while.

    `full_size` previews have the size and the format of the images; others that of the latents, as PNG.
    Raises what the images' making raises.
    """
    jobs = answer.ticket.jobs
    images = [asyncio.create_task(answer.image(job)) for job in jobs]
    for image in images:
        image.add_done_callback(lambda _: watcher.woken.set())
    position: int | None = None
    steps_done: tuple[int, ...] = (0,) * len(jobs)
    num_finished = 0
    try:
        while num_finished < len(jobs):
            try:
                async with asyncio.timeout(_KEEP_ALIVE_S):
                    await watcher.woken.wait()
            except TimeoutError:
                yield None
                continue
            watcher.woken.clear()
            ticket = answer.ticket
            if ticket.started_at is None and ticket.queue_position not in (None, position):
                position = ticket.queue_position
                yield Queued(position or 1)
            now_done = tuple(job.step_index for job in jobs)
            if now_done != steps_done:
                steps_done = now_done
                yield Progress(steps_done)
            while watcher.previews:
                preview = watcher.previews.popleft()
                yield PreviewImage(preview, await _encoded(answer, preview, full_size=full_size))
            while num_finished < len(jobs) and images[num_finished].done():
                yield Finished(jobs[num_finished], await images[num_finished])
                num_finished += 1
    finally:
        for image in images:
            image.cancel()
        await asyncio.gather(*images, return_exceptions=True)


async def _encoded(answer: Answer, preview: Preview, *, full_size: bool) -> bytes:
    side = answer.model.resolution if full_size else len(preview.pixels)
    format, quality = (answer.format, answer.quality) if full_size else ("png", 100)
    return await asyncio.get_running_loop().run_in_executor(
        answer.runtime.encoders, encode_preview, preview.pixels, side, format, quality
    )


class EventStream(StreamingResponse):
    """Events for as long as the client is there to read them; a failure after the start is the last one."""

    def __init__(
        self,
        answer: Answer,
        events: AsyncIterator[bytes | None],
        *,
        error_event: Callable[[ServiceError], dict[str, Any]],
    ) -> None:
        # nginx would keep events back until it has a buffer full of them.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        written = _written(events, error_event, answer.runtime.metrics)
        super().__init__(written, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._answer):
            await attended(receive, self.stream_response(send))


def event(kind: str, data: dict[str, Any]) -> bytes:
    """One event; JSON escapes line ends, so its data is one line."""
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


async def _written(
    events: AsyncIterator[bytes | None],
    error_event: Callable[[ServiceError], dict[str, Any]],
    metrics: Metrics,
) -> AsyncIterator[bytes]:
    try:
        async for written in events:
            yield _KEEP_ALIVE if written is None else written
    except ServiceError as error:
        metrics.count_error(error)
        yield event("error", error_event(error))
    except Exception:  # a defect of ours: the client hears of it, the log gets the trace
        defect = ServiceError("internal error; the server's log has the reason under this id")
        yield event("error", error_event(defect))
        raise
