"""Traces of requests by OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT says to whom they go.

    POST /generate     from a request's arrival to its answer; its parent is the client's `traceparent`
    |-- queue          until the first image's first step
    |-- denoise        until the last image's last step
    |-- decode         until the last image's pixels
    `-- encode         until the answer is written

A request that ends early has spans up to the stage that it ended in, which says why. Spans are made when the
request is over, of moments that are noted anyway: without the variable nothing is imported and nothing done.
What is sent names the request, its model and its settings, and never a key.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from service.errors import ServiceError, StartupError, shown
from service.metrics import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Status

    from service.engine.request import Ticket

__all__ = ["RequestTrace", "Tracing", "tracing_of_environment"]

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"


def tracing_of_environment() -> Tracing | None:
    """What OpenTelemetry's own variables ask for; None where they name no endpoint.

    Raises StartupError where it cannot be had.
    """
    named = [variable for variable in _ENDPOINTS if os.environ.get(variable)]
    if not named:
        return None
    for variable in _PROTOCOLS:
        if os.environ.get(variable, _PROTOCOL) != _PROTOCOL:
            raise StartupError(
                f"{variable}: {shown(os.environ[variable])} given; this server accepts {_PROTOCOL}"
            )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartupError(
            f"{named[0]}: set, and OpenTelemetry is not installed; `pip install 'lamamba[otel]'` does it"
        ) from error
    return Tracing(BatchSpanProcessor(OTLPSpanExporter()))


class Tracing:
    """Makes the traces of one server. It has its own provider: the process' global one is left alone."""

    def __init__(self, processor: SpanProcessor) -> None:
        """`processor` gets the spans."""
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = Resource({"service.name": "lamamba", "service.version": version("lamamba")})
        # What the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) wins.
        self._provider = TracerProvider(
            resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lamamba")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, route: str, headers: Mapping[str, str], *, started: float) -> RequestTrace:
        """The trace of a request that came at `started`, a reading of `time.monotonic()`."""
        return RequestTrace(self, route, self._propagator.extract(headers), started)

    def close(self) -> None:
        """Send what is left, and no more after it: at most for OTEL_EXPORTER_OTLP_TIMEOUT seconds, 10."""
        self._provider.shutdown()

    def record(self, trace: RequestTrace, ticket: Ticket) -> None:
        """Make the spans of a request that is over."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        now = time.monotonic()
        epoch_ns = time.time_ns() - round(now * 1e9)
        request = ticket.request
        attributes: dict[str, str | int] = {
            "lamamba.request_id": request.request_id,
            "lamamba.model": request.model,
            "lamamba.steps": request.num_inference_steps,
            "lamamba.sampler": request.sampler,
            "lamamba.images": request.num_images,
        }

        def ns(moment: float) -> int:
            return epoch_ns + round(moment * 1e9)

        reason = _failure(ticket)
        root = self._tracer.start_span(
            f"POST {trace.route}",
            context=trace.parent,
            kind=SpanKind.SERVER,
            attributes=attributes | {"http.request.method": "POST", "http.route": trace.route},
            start_time=ns(trace.started),
        )
        context = set_span_in_context(root)
        for stage, start, end in _stages(ticket):
            span = self._tracer.start_span(
                stage, context=context, attributes=attributes, start_time=ns(start)
            )
            if end is None and reason is not None:
                span.set_status(_error(reason))
            span.end(ns(now if end is None else end))
        if reason is not None:
            root.set_status(_error(reason))
        root.end(ns(now))


class RequestTrace:
    """What is known of a request's trace before the request is over."""

    def __init__(self, tracing: Tracing, route: str, parent: Context, started: float) -> None:
        self.route = route
        self.parent = parent
        self.started = started
        self._tracing = tracing

    def end(self, ticket: Ticket) -> None:
        """The request is over: answered, failed or given up."""
        self._tracing.record(self, ticket)


def _error(reason: str) -> Status:
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR, reason)


def _failure(ticket: Ticket) -> str | None:
    """Why a request that is over has not all of its images; None: it has."""
    for job in ticket.jobs:
        if job.result.cancelled():
            return "cancelled"
        error = job.result.exception()
        if error is not None:
            return error.code if isinstance(error, ServiceError) else type(error).__name__
    return None


def _stages(ticket: Ticket) -> Iterator[tuple[str, float, float | None]]:
    """Name, start and end of each stage that a request has come to; None: the request ended in it."""
    finished = all(job.finished for job in ticket.jobs)
    moments = (
        ticket.submitted_at,
        ticket.started_at,
        ticket.denoised_at if finished else None,
        ticket.decoded_at if ticket.made else None,
        None,
    )
    for stage, start, end in zip(STAGES, moments[:-1], moments[1:], strict=True):
        if start is None:
            return
        yield stage, start, end
