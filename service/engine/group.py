"""The engines of one process, one a device, behind one door: each request goes to where least is to be done.

    submit() -> least-loaded engine that lives
    an engine dies -> its threads end -> its requests start again on another, once; its device gets a new one
    add_lane() -> a copy of the model for each engine, warmed beside the others; all of them serve it, or none
    retire_lane() -> the engines keep it until the last image of a request to it is answered

A seed fixes an image whatever makes it, so that a request that starts again is answered with the same. A
group of one has nobody to turn to: its requests are answered with EngineStopped, and the process is to be
restarted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from service.engine.request import GenerationRequest, Ticket
from service.errors import EngineStopped, QueueFull

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

    from service.engine.engine import Engine
    from service.engine.pipeline import ServedPipeline
    from service.engine.request import LaneName, Watcher
    from service.metrics import Metrics

__all__ = ["EngineGroup", "LoadCopy"]

LoadCopy = Callable[[int], "ServedPipeline"]
"""Loads the copy of a model that the engine of an index runs."""

MAX_RESTARTS: Final = 1
"""Of a request: one that kills two engines is not given a third."""
_END_S: Final = 30.0  # for a dead engine's thread to end: a step, or what the decoder has before it
_ALL_STOPPED: Final = "every engine has stopped; this server is about to be restarted"
_LEAST_REBUILD_WAIT_S, _MOST_REBUILD_WAIT_S = 1.0, 300.0

_logger = logging.getLogger(__name__)


class EngineGroup:
    """Engines of the same models on different devices, with the interface of one."""

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        lanes: Mapping[LaneName, LoadCopy],
        rebuild: Callable[[int, Mapping[LaneName, LoadCopy]], Engine],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            engines: one a device, not started.
            lanes: what they serve.
            rebuild: makes the engine of an index again, not started, with the lanes that there are by then.
        """
        self._engines = list(engines)
        self._lanes = dict(lanes)
        self._rebuild = rebuild
        self._metrics = metrics
        self._clock = clock
        self._building = threading.Lock()  # held while an engine is made again, or gets a lane
        # Guards the next four, and the two above. Whoever holds it may give requests up, which counts them.
        self._lock = threading.RLock()
        self._open_images: Counter[LaneName] = Counter()
        """Images that have been accepted and are not answered."""
        self._owners: WeakKeyDictionary[Ticket, Engine] = WeakKeyDictionary()
        self._num_moving = 0
        """Requests between two engines."""
        self._draining = False
        self._deaths: queue.SimpleQueue[Engine | None] = queue.SimpleQueue()
        self._supervisor = threading.Thread(target=self._supervise, name="lamamba-supervisor", daemon=True)

    def start(self) -> None:
        """Start the engines one after the other. Raises what the first run of one raised."""
        for engine in self._engines:
            self._watch(engine)
            engine.start()
        if len(self._engines) > 1:
            self._supervisor.start()

    def submit(self, request: GenerationRequest, watcher: Watcher | None = None) -> Ticket:
        """As `Engine.submit`, by the engine with the least work that has room."""
        with self._lock:
            full: QueueFull | None = None
            for engine in self._by_load(request.lane):
                try:
                    ticket = engine.submit(request, watcher)
                except QueueFull:
                    full = self._queue_full(request.num_images)
                except EngineStopped:
                    _logger.debug("%s has stopped; another engine is asked", engine.device)
                else:
                    self._owners[ticket] = engine
                    self._count(ticket)
                    return ticket
        raise full or EngineStopped(_ALL_STOPPED)

    def cancel(self, ticket: Ticket) -> None:
        """As `Engine.cancel`."""
        with self._lock:
            self._owners[ticket].cancel(ticket)

    def add_lane(self, lane: LaneName, load: LoadCopy) -> ServedPipeline:
        """Load a model for every engine that lives and warm it there, while they go on with the others.

        Blocks until all of them serve it, and returns the copy of the first. Raises what `load` or a warm-up
        has raised, or EngineStopped; then none of them does.
        """
        with self._building:
            with self._lock:
                engines = {index: engine for index, engine in enumerate(self._engines) if engine.alive}
            if not engines:
                raise EngineStopped(_ALL_STOPPED)
            copies = [load(index) for index in engines]
            joined: list[Future[None]] = []
            try:
                for engine, copy in zip(engines.values(), copies, strict=True):
                    joined.append(engine.add_lane(lane, copy))
                for future in joined:
                    future.result()
            except BaseException:
                wait(joined)  # a warm-up that goes on would end with one that serves
                for engine in engines.values():
                    engine.remove_lane(lane)
                raise
            with self._lock:
                self._lanes[lane] = load
            return copies[0]

    def retire_lane(self, lane: LaneName) -> None:
        """Forget a model once its accepted images are answered; to be called after the last submission."""
        with self._lock:
            del self._lanes[lane]
            if not self._open_images[lane]:
                self._remove(lane)

    def retiring_images(self, model: str) -> dict[int, int]:
        """Images in the making of the versions of a model that are served no longer, by version."""
        with self._lock:
            return {
                lane.version: images
                for lane, images in sorted(self._open_images.items())
                if lane.model == model and lane not in self._lanes and images
            }

    def drain(self) -> None:
        """Accept no further requests; those accepted are finished."""
        with self._lock:
            self._draining = True
            for engine in self._engines:
                engine.drain()

    def stop(self) -> None:
        """End the engines; requests that are not finished are answered with Draining."""
        self.drain()
        self._deaths.put(None)
        if self._supervisor.is_alive():
            self._supervisor.join()
        for engine in self._engines:
            engine.stop()

    @property
    def failure(self) -> BaseException | None:
        """What the last engine has died of, once none lives."""
        failures = [engine.failure for engine in self._engines]
        return None if None in failures else failures[-1]

    @property
    def idle(self) -> bool:
        """Whether every accepted request is answered."""
        with self._lock:
            return not self._num_moving and all(engine.idle for engine in self._engines)

    @property
    def max_rows(self) -> int:
        """Network rows of a step: of the engine with the fewest."""
        return min(engine.max_rows for engine in self._engines)

    @property
    def num_alive(self) -> int:
        """Engines that work, or can."""
        return sum(engine.alive for engine in self._engines)

    def _watch(self, engine: Engine) -> None:
        if len(self._engines) > 1:
            engine.on_death = partial(self._deaths.put, engine)

    def _queue_full(self, num_images: int) -> QueueFull:
        alive = [engine for engine in self._engines if engine.alive]
        waiting = sum(engine.num_waiting_images for engine in alive)
        return QueueFull.of(
            waiting=waiting,
            given=num_images,
            accepted=sum(engine.max_queue_images for engine in alive),
            retry_after_s=alive[0].estimated_wait_s(waiting) if alive else 1.0,
        )

    def _count(self, ticket: Ticket) -> None:
        lane = ticket.request.lane
        self._open_images[lane] += len(ticket.jobs)
        for job in ticket.jobs:
            job.result.add_done_callback(lambda _: self._answered(lane))

    def _answered(self, lane: LaneName) -> None:
        """Count an image that is made, failed or given up; called in whichever thread that happens."""
        with self._lock:
            self._open_images[lane] -= 1
            if not self._open_images[lane] and lane not in self._lanes:
                self._remove(lane)

    def _remove(self, lane: LaneName) -> None:
        del self._open_images[lane]
        for engine in self._engines:
            engine.remove_lane(lane)

    def _by_load(self, lane: LaneName) -> list[Engine]:
        alive = [engine for engine in self._engines if engine.alive and engine.serves(lane)]
        return sorted(alive, key=lambda engine: engine.open_rows)

    # --- the supervisor's thread ---

    def _supervise(self) -> None:
        due: dict[int, float] = {}  # when an engine is made again, by index
        waits: dict[int, float] = {}
        while True:
            wait_s = max(0.0, min(due.values()) - self._clock()) if due else None
            try:
                dead = self._deaths.get(timeout=wait_s)
            except queue.Empty:
                for index in [index for index, at in due.items() if at <= self._clock()]:
                    if self._draining or self._replace(index):
                        del due[index]
                    else:
                        waits[index] = min(_MOST_REBUILD_WAIT_S, 2 * waits[index])
                        due[index] = self._clock() + waits[index]
                continue
            if dead is None:
                return
            if dead not in self._engines:  # a new one that died in its first run
                continue
            index = self._engines.index(dead)
            self._move_requests(dead)
            waits[index] = _LEAST_REBUILD_WAIT_S
            due[index] = self._clock()

    def _move_requests(self, dead: Engine) -> None:
        _logger.error("the engine of %s has died; its requests start again on another", dead.device)
        with self._lock:
            self._num_moving += 1
        tickets = dead.evacuate(_END_S)
        with self._lock:
            for ticket in tickets:
                self._move(ticket)
            self._num_moving -= 1

    def _move(self, ticket: Ticket) -> None:
        if ticket.done:  # its client has left meanwhile
            return
        others = self._by_load(ticket.request.lane) if ticket.restarts < MAX_RESTARTS else []
        ticket.restart()
        for engine in others:
            try:
                engine.adopt(ticket)
            except EngineStopped:
                continue
            self._owners[ticket] = engine
            return
        if ticket.fail(EngineStopped("the engine has stopped, and no other could make the request's images")):
            self._metrics.request_success.labels("error").inc()

    def _replace(self, index: int) -> bool:
        with self._building:
            return self._built(index)

    def _built(self, index: int) -> bool:
        dead = self._engines[index]
        with self._lock:
            lanes = dict(self._lanes)
        try:
            engine = self._rebuild(index, lanes)
            self._watch(engine)
            try:
                engine.start()
            except Exception:
                engine.stop()
                raise
        except Exception:  # whatever a broken device makes libraries raise
            _logger.exception("no new engine on %s; another try follows", dead.device)
            return False
        with self._lock:
            self._engines[index] = engine
            for lane in lanes.keys() - self._lanes.keys():  # retired in the meantime
                engine.remove_lane(lane)
            if self._draining:
                engine.drain()
        _logger.info("a new engine works on %s", engine.device)
        return True
