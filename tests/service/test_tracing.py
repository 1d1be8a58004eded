"""service/tracing.py: if this fails, an operator cannot see where a request's time went, or sees keys."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.app import create_app
from service.errors import StartupError
from service.metrics import STAGES
from service.settings import Settings
from service.tracing import Tracing, tracing_of_environment
from tests.fakes import fake_pipeline

BODY: dict[str, Any] = {"class_id": 1, "steps": 3, "seed": 5, "num_images": 2}
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ATTRIBUTES = {
    "lamamba.request_id": "wanted",
    "lamamba.model": "fake-16",
    "lamamba.steps": 3,
    "lamamba.sampler": "dpm++",
    "lamamba.images": 2,
}
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Collector:
    """A small OTLP/HTTP receiver."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.paths.add(self.path)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def traced() -> Iterator[tuple[TestClient, InMemorySpanExporter, FastAPI]]:
    """A client of a server whose spans are kept in memory."""
    exporter = InMemorySpanExporter()
    app = create_app(Settings(), (fake_pipeline(),))
    app.state.runtime.tracing = Tracing(SimpleSpanProcessor(exporter))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, exporter, app


Traced = tuple[TestClient, InMemorySpanExporter, FastAPI]


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/generate", BODY, id="generate"),
        pytest.param("/v1/images/generations", {"prompt": 1, "n": 2, "steps": 3}, id="openai"),
    ],
)
def test_a_request_is_a_trace_of_its_stages(traced: Traced, path: str, body: dict[str, Any]) -> None:
    client, exporter, _ = traced
    headers = {"X-Request-ID": "wanted", "Authorization": "Bearer lamamba-secret", "X-API-Key": "secret"}
    assert client.post(path, json=body, headers=headers).status_code == 200
    spans = by_name(exporter)
    assert set(spans) == {f"POST {path}", *STAGES}
    root = spans[f"POST {path}"]
    assert root.parent is None
    assert dict(root.attributes or {}) == ATTRIBUTES | {
        "http.request.method": "POST",
        "http.route": path,
    }
    assert root.start_time is not None
    at = root.start_time
    for stage in STAGES:
        span = spans[stage]
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
        assert dict(span.attributes or {}) == ATTRIBUTES
        assert span.status.is_unset
        assert span.start_time is not None
        assert span.end_time is not None
        assert at <= span.start_time <= span.end_time
        at = span.end_time
    assert root.end_time is not None
    assert at <= root.end_time
    assert "secret" not in "".join(span.to_json() for span in spans.values())


@pytest.mark.parametrize(("flags", "recorded"), [("01", True), ("00", False)], ids=["sampled", "not-sampled"])
def test_the_clients_trace_goes_on(traced: Traced, flags: str, recorded: bool) -> None:
    client, exporter, _ = traced
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-{flags}"}
    assert client.post("/generate", json=BODY, headers=headers).status_code == 200
    spans = by_name(exporter)
    assert bool(spans) is recorded
    if recorded:
        root = spans["POST /generate"]
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == SPAN
        assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}


def test_a_traceparent_that_is_none_begins_a_new_trace(traced: Traced) -> None:
    client, exporter, _ = traced
    assert client.post("/generate", json=BODY, headers={"traceparent": "00-nonsense"}).status_code == 200
    assert by_name(exporter)["POST /generate"].parent is None


def test_a_failed_request_says_where_and_why(traced: Traced) -> None:
    client, exporter, app = traced
    network: Any = app.state.runtime.catalog.default.pipeline.network
    network.failing_label = 1
    assert client.post("/generate", json=BODY).status_code == 500
    spans = by_name(exporter)
    assert set(spans) == {"POST /generate", "queue", "denoise"}
    for name in ("POST /generate", "denoise"):
        assert spans[name].status.description == "generation_failed"
    assert spans["queue"].status.is_unset


def test_events_are_traced_to_their_end(traced: Traced) -> None:
    client, exporter, _ = traced
    answer = client.post("/generate", json=BODY, headers={"Accept": "text/event-stream"})
    assert "event: result" in answer.text
    assert set(by_name(exporter)) == {"POST /generate", *STAGES}


def test_a_request_that_is_refused_is_no_trace(traced: Traced) -> None:
    client, exporter, _ = traced
    assert client.post("/generate", json=BODY | {"steps": 0}).status_code == 422
    assert not exporter.get_finished_spans()


def test_spans_reach_a_collector_before_the_server_ends(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    with TestClient(create_app(Settings(), (fake_pipeline(),))) as client:
        assert client.post("/generate", json=BODY).status_code == 200
    assert collector.paths == {"/v1/traces"}
    (resource,) = [spans for request in collector.requests for spans in request.resource_spans]
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "pictures"
    assert {span.name for scope in resource.scope_spans for span in scope.spans} == {
        "POST /generate",
        *STAGES,
    }


def test_without_an_endpoint_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # every import of it fails
    assert tracing_of_environment() is None
    with TestClient(create_app(Settings(), (fake_pipeline(),))) as client:
        assert client.post("/generate", json=BODY).status_code == 200


def test_an_endpoint_without_the_packages_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://user:secret@localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=rf"^{ENDPOINT}: set, .*pip install 'lamamba\[otel\]'") as refusal:
        create_app(Settings(), (fake_pipeline(),))
    assert "secret" not in str(refusal.value)


def test_a_protocol_that_is_not_spoken_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://localhost:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(StartupError, match='OTEL_EXPORTER_OTLP_PROTOCOL: "grpc" given'):
        tracing_of_environment()
