"""What the server counts and times, for Prometheus. Names are vLLM's with the prefix `lamamba_`.

    request -> queue -> denoise -> decode -> encode -> response
               '-- lamamba_stage_latency_seconds{stage} --'   all of it: lamamba_e2e_request_latency_seconds

Stages are timed of requests that were answered with images, the time in the queue
(lamamba_request_queue_time_seconds) of all that left it for the device.

A `Metrics` owns its registry, so that a process (or a test) can hold several servers. Label values come
from fixed sets (the names of keys are the operator's): nothing that a client sends becomes a label.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.errors import EngineStopped, RequestError, Retryable, ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "FINISHED_REASONS",
    "METRICS_CONTENT_TYPE",
    "STAGES",
    "MetricDefinition",
    "Metrics",
    "RateWindow",
    "rows_label",
]

METRICS_CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_NAMESPACE: Final = "lamamba"
STAGES: Final = ("queue", "denoise", "decode", "encode")
FINISHED_REASONS: Final = ("stop", "abort", "error", "timeout")
"""How an accepted request ends, in vLLM's words: made; its client left; failed; over its timeout_s."""

# From a few milliseconds (encoding) to minutes (ddpm at 250 steps behind a full queue).
_SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    320.0,
    640.0,
)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SHARES = tuple(tenth / 10 for tenth in range(1, 11))


def rows_label(num_rows: int) -> str:
    """The bucket of a step's rows as a label: the least power of two that holds them, or "more"."""
    return next((str(bound) for bound in _ROWS if num_rows <= bound), "more")


@dataclass(frozen=True, kw_only=True)
class MetricDefinition:
    """What is said of a metric, on its page as in its answer."""

    name: str
    """As a query names it."""
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str


def _error_classes(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _error_classes(below)


class RateWindow:
    """Events a second over the last `window_s` seconds; safe to use from several threads."""

    def __init__(self, window_s: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._started = clock()
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def add(self) -> None:
        """Count one event, now."""
        with self._lock:
            self._times.append(self._clock())

    def per_second(self) -> float:
        """The rate over the window, or over the time since the start where that is shorter."""
        now = self._clock()
        with self._lock:
            while self._times and self._times[0] <= now - self._window_s:
                self._times.popleft()
            return len(self._times) / max(1.0, min(self._window_s, now - self._started))


class Metrics:
    """The server's instruments. The engine and the routes write them; `/metrics` reads them."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.definitions: list[MetricDefinition] = []
        """Every metric, in the order of this file."""
        self.image_rate = RateWindow(clock=clock)

        self.requests = self._counter("requests", "HTTP requests answered.", "route", "status")
        self.api_key_requests = self._counter("api_key_requests", "Requests by the key's name.", "name")
        self.images = self._counter("images", "Images denoised and decoded.")
        self.steps = self._counter("denoising_steps", "Denoising steps run, whatever their number of rows.")
        self.rows = self._counter("rows", "Rows denoised: network evaluations of one image.")
        self.padded_rows = self._counter(
            "padded_rows", "Rows computed for no image, which fill a step up to a captured size."
        )
        self.request_success = self._counter(
            "request_success",
            f"Accepted requests that have ended, by how: {', '.join(FINISHED_REASONS)}.",
            "finished_reason",
        )
        self.rejections = self._counter("rejections", "Requests turned away, by error code.", "code")
        self.errors = self._counter("errors", "Requests answered with an error of the server's.", "code")
        self.idempotent_answers = self._counter(
            "idempotent_answers",
            "Requests that another one of their Idempotency-Key has answered: kept or joined.",
            "source",
        )
        self.cancellations = self._counter("cancellations", "Requests whose client left before the answer.")
        self.model_loads = self._counter(
            "model_loads", "Loads of models while the server runs, by result: loaded or failed.", "result"
        )
        self.failures = self._counter(
            "failures", "Requests that were accepted and failed, by stage.", "stage"
        )
        self.out_of_memory_recoveries = self._counter(
            "out_of_memory_recoveries",
            "Steps that did not fit the device's memory and were taken again with fewer rows.",
            "device",
        )
        self.deadlines_exceeded = self._counter(
            "deadline_exceeded", "Requests given up at their deadline, by the stage they were in.", "stage"
        )

        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its answer.", _SECONDS
        )
        self.stage_latency = self._histogram(
            "stage_latency_seconds", "Time a request spent in a stage.", _SECONDS, "stage"
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "From a request's acceptance to its first step.", _SECONDS
        )
        self.time_to_first_preview = self._histogram(
            "time_to_first_preview_seconds", "From a request's acceptance to its first preview.", _SECONDS
        )
        self.step_latency = self._histogram(
            "step_latency_seconds",
            "Time of a denoising step, by its rows, rounded up to a power of two.",
            _STEP_SECONDS,
            "rows",
        )
        self.step_rows = self._histogram("step_rows", "Rows of a denoising step.", _ROWS)
        self.batch_occupancy = self._histogram(
            "batch_occupancy", "Rows of a denoising step as a share of max_rows.", _SHARES
        )

        self._gauge("images_per_second", "Images finished a second, over the last minute.").set_function(
            self.image_rate.per_second
        )
        self._requests_running = self._gauge(
            "num_requests_running", "Requests with work on the device.", "device"
        )
        self._requests_waiting = self._gauge(
            "num_requests_waiting", "Requests none of whose images has started.", "device"
        )
        self._images_waiting = self._gauge("queue_images", "Images that wait for a slot.", "device")
        self._active_slots = self._gauge("active_slots", "Images that hold a slot.", "device")
        self._row_limit = self._gauge(
            "row_limit", "Most rows of a step now: max_rows, or fewer after it ran out of memory.", "device"
        )
        self._models_loaded = self._gauge(
            "model_loaded", "1 for a model that is loaded, 0 for one that has been unloaded.", "model"
        )
        self._model_versions = self._gauge(
            "model_version", "Version of a loaded model: which load of its name it is.", "model"
        )
        self._gpu_memory = self._gauge(
            "gpu_memory_bytes",
            "Memory of a GPU: allocated and reserved by this process, and total.",
            "device",
            "kind",
        )
        self._build = self._gauge("build_info", "1, with what this server is built of.", "version", "torch")
        for result in ("loaded", "failed"):
            self.model_loads.labels(result)
        # Shown from the start, with zeros: in a series that begins with its first event Prometheus sees no
        # increase.
        for kind in _error_classes(ServiceError):
            self._errors_of(kind)
        for stage in STAGES:
            self.stage_latency.labels(stage)
        for reason in FINISHED_REASONS:
            self.request_success.labels(reason)
        for source in ("kept", "joined"):
            self.idempotent_answers.labels(source)
        for stage in ("denoise", "decode"):
            self.failures.labels(stage)
        for stage in ("queue", "denoise", "decode"):
            self.deadlines_exceeded.labels(stage)

    def read_load(
        self,
        device: object,
        *,
        requests_running: Callable[[], float],
        requests_waiting: Callable[[], float],
        images_waiting: Callable[[], float],
        active_slots: Callable[[], float],
        row_limit: Callable[[], float],
    ) -> None:
        """Name the functions that the load gauges of a device read at each scrape, so that they are never
        stale.
        """
        self._requests_running.labels(device).set_function(requests_running)
        self._requests_waiting.labels(device).set_function(requests_waiting)
        self._images_waiting.labels(device).set_function(images_waiting)
        self._active_slots.labels(device).set_function(active_slots)
        self._row_limit.labels(device).set_function(row_limit)
        self.out_of_memory_recoveries.labels(device)

    def read_gpu_memory(self, device: object, kinds: Mapping[str, Callable[[], float]]) -> None:
        """Name the functions that give a GPU's memory in bytes; a server on a CPU has none."""
        for kind, read in kinds.items():
            self._gpu_memory.labels(device, kind).set_function(read)

    def show_model(self, name: str, *, version: int) -> None:
        """Say that a model is loaded."""
        self._models_loaded.labels(name).set(1)
        self._model_versions.labels(name).set(version)

    def hide_model(self, name: str) -> None:
        """Say that a model is loaded no longer."""
        self._models_loaded.labels(name).set(0)
        self._model_versions.remove(name)

    def show_build(self, *, version: str, torch: str) -> None:
        """Say which versions this server is built of."""
        self._build.labels(version, torch).set(1)

    def count_error(self, error: ServiceError) -> None:
        """Count a request that is answered with an error: turned away, or failed by a fault of ours."""
        self._errors_of(type(error)).inc()

    def count_step(self, *, seconds: float, rows: int, computed_rows: int, max_rows: int) -> None:
        """Count one denoising step of so many rows, of which `computed_rows` were run, padding included."""
        self.steps.inc()
        self.rows.inc(rows)
        self.padded_rows.inc(computed_rows - rows)
        self.step_rows.observe(rows)
        self.step_latency.labels(rows_label(rows)).observe(seconds)
        self.batch_occupancy.observe(rows / max_rows)

    def count_image(self) -> None:
        """Count one finished image."""
        self.images.inc()
        self.image_rate.add()

    def render(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)

    def _errors_of(self, kind: type[ServiceError]) -> Counter:
        turned_away = issubclass(kind, (RequestError, Retryable)) and not issubclass(kind, EngineStopped)
        return (self.rejections if turned_away else self.errors).labels(kind.code)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._define(f"{name}_total", "counter", labels, text)
        return Counter(name, text, labels, namespace=_NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self._define(name, "gauge", labels, text)
        return Gauge(name, text, labels, namespace=_NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        self._define(name, "histogram", labels, text)
        return Histogram(name, text, labels, namespace=_NAMESPACE, registry=self.registry, buckets=buckets)

    def _define(
        self, name: str, kind: Literal["counter", "gauge", "histogram"], labels: tuple[str, ...], text: str
    ) -> None:
        full_name = f"{_NAMESPACE}_{name}"
        self.definitions.append(MetricDefinition(name=full_name, kind=kind, labels=labels, text=text))
