"""The engines of one process, one a device, behind one door: each request goes to where least is to be done.

    submit() -> least-loaded engine that lives
    an engine dies -> its threads end -> its requests start again on another, once; its device gets a new one

A seed fixes an image whatever makes it, so that a request that starts again is answered with the same. A
group of one has nobody to turn to: its requests are answered with EngineStopped, and the process is to be
restarted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from service.engine.request import GenerationRequest, Ticket
from service.errors import EngineStopped, QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.engine.engine import Engine
    from service.engine.request import Watcher
    from service.metrics import Metrics

__all__ = ["EngineGroup"]

MAX_RESTARTS: Final = 1
"""Of a request: one that kills two engines is not given a third."""
_END_S: Final = 30.0  # for a dead engine's thread to end: a step, or what the decoder has before it
_LEAST_REBUILD_WAIT_S, _MOST_REBUILD_WAIT_S = 1.0, 300.0

_logger = logging.getLogger(__name__)


class EngineGroup:
    """Engines of the same models on different devices, with the interface of one."""

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        rebuild: Callable[[int], Engine],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            engines: one a device, not started.
            rebuild: makes the engine of an index again, not started.
        """
        self._engines = list(engines)
        self._rebuild = rebuild
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()  # guards the next three, and the list above
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
            for engine in self._by_load():
                try:
                    ticket = engine.submit(request, watcher)
                except QueueFull:
                    full = self._queue_full(request.num_images)
                except EngineStopped:
                    _logger.debug("%s has stopped; another engine is asked", engine.device)
                else:
                    self._owners[ticket] = engine
                    return ticket
        raise full or EngineStopped("every engine has stopped; this server is about to be restarted")

    def cancel(self, ticket: Ticket) -> None:
        """As `Engine.cancel`."""
        with self._lock:
            self._owners[ticket].cancel(ticket)

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

    def _by_load(self) -> list[Engine]:
        alive = [engine for engine in self._engines if engine.alive]
        # On the way of every request, and the load of one engine alone decides nothing.
        return sorted(alive, key=lambda engine: engine.rows_left) if len(alive) > 1 else alive

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
        others = self._by_load() if ticket.restarts < MAX_RESTARTS else []
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
        dead = self._engines[index]
        try:
            engine = self._rebuild(index)
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
            if self._draining:
                engine.drain()
        _logger.info("a new engine works on %s", engine.device)
        return True
