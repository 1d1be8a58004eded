"""service/metrics.py: if this fails, autoscalers and dashboards see what is not there, or miss what is."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.engine.engine import Engine
from service.engine.request import LaneName
from service.errors import EngineStopped, GenerationFailed, InvalidField, QueueFull
from service.metrics import FINISHED_REASONS, Metrics, RateWindow, rows_label
from service.metrics_table import metrics_page
from service.runtime import Runtime
from tests.fakes import fake_pipeline
from tests.service.conftest import ClientFactory
from tests.service.engine_requests import REQUEST, TIMEOUT_S

BODY: dict[str, Any] = {"class_id": 2, "steps": 6, "seed": 9}


def values(text: str) -> dict[str, float]:
    """Samples by name and labels, as `name{label=value,...}` without the prefix."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("lamamba_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def moved(client: TestClient, act: Callable[[], object]) -> dict[str, float]:
    """What `act` added to each sample, where it added something."""
    before = values(client.get("/metrics").text)
    act()
    runtime: Runtime = client.app.state.runtime  # type: ignore[attr-defined]
    deadline = time.monotonic() + TIMEOUT_S
    while not runtime.idle:  # an answer may come a moment before it is counted
        assert time.monotonic() < deadline
        time.sleep(0.001)
    after = values(client.get("/metrics").text)
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name)}


def test_a_request_moves_what_counts_requests_work_and_time(client_of: ClientFactory) -> None:
    client = client_of(max_rows=8)
    change = moved(client, lambda: client.post("/generate", json=BODY | {"num_images": 2}))
    expected = {
        "requests_total{route=/generate,status=200}": 1,
        "request_success_total{finished_reason=stop}": 1,
        "images_total": 2,
        "denoising_steps_total": 6,
        "rows_total": 24,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1,
        "step_latency_seconds_count{rows=4}": 6,
        "step_rows_sum": 24,
        "batch_occupancy_sum": 6 * 4 / 8,
        "images_per_second": 2,
    } | {
        f"stage_latency_seconds_count{{stage={stage}}}": 1
        for stage in ("queue", "denoise", "decode", "encode")
    }
    assert {name: change.get(name) for name in expected} == expected
    assert change["e2e_request_latency_seconds_sum"] >= change["stage_latency_seconds_sum{stage=denoise}"] > 0


def test_a_preview_moves_its_time_once(client_of: ClientFactory) -> None:
    client = client_of()
    headers = {"Accept": "text/event-stream"}
    body = BODY | {"previews": 3}
    change = moved(client, lambda: client.post("/generate", json=body, headers=headers))
    assert change["time_to_first_preview_seconds_count"] == 1
    assert "time_to_first_preview_seconds_count" not in moved(
        client, lambda: client.post("/generate", json=BODY, headers=headers)
    )


@pytest.mark.parametrize(
    ("content", "settings", "code"),
    [
        pytest.param(b"{", {}, "invalid_json", id="400"),
        pytest.param(b" " * 300, {"max_body_bytes": 256}, "payload_too_large", id="413"),
        pytest.param(b'{"class_id": 9}', {}, "invalid_field", id="422"),
        pytest.param(b'{"class_id": 1, "num_images": 2}', {"max_queue_images": 1}, "queue_full", id="429"),
    ],
)
def test_a_request_that_is_turned_away_moves_its_reason(
    client_of: ClientFactory, content: bytes, settings: dict[str, Any], code: str
) -> None:
    client = client_of(**settings)
    headers = {"Content-Type": "application/json"}
    change = moved(client, lambda: client.post("/generate", content=content, headers=headers))
    assert change[f"rejections_total{{code={code}}}"] == 1
    assert not any(name.startswith(("errors_total", "request_success_total")) for name in change)


def test_a_failure_moves_its_kind_streamed_or_not(client_of: ClientFactory) -> None:
    pipeline = fake_pipeline()
    client = client_of(pipeline)
    pipeline.network.failing_label = 3  # type: ignore[attr-defined]
    for accept in ("application/json", "text/event-stream"):
        failing = partial(client.post, "/generate", json=BODY | {"class_id": 3}, headers={"Accept": accept})
        change = moved(client, failing)
        assert change["errors_total{code=generation_failed}"] == 1, accept
        assert change["request_success_total{finished_reason=error}"] == 1
        assert not any(name.startswith("rejections_total") for name in change)
    change = moved(
        client,
        lambda: client.post("/generate", json=BODY | {"steps": 1000, "num_images": 16, "timeout_s": 0.02}),
    )
    assert change["errors_total{code=deadline_exceeded}"] == 1
    assert change["request_success_total{finished_reason=timeout}"] == 1


def test_errors_are_rejections_where_the_request_was_turned_away() -> None:
    metrics = Metrics()
    for error in (
        InvalidField("steps", 0, "1 to 9"),
        QueueFull("full"),
        GenerationFailed("failed"),
        EngineStopped("stopped"),
    ):
        metrics.count_error(error)
    counted = {name for name, value in values(metrics.render().decode()).items() if value == 1}
    assert counted == {
        "rejections_total{code=invalid_field}",
        "rejections_total{code=queue_full}",
        "errors_total{code=generation_failed}",
        "errors_total{code=engine_stopped}",
    }


def test_every_error_is_shown_from_the_start() -> None:
    shown = {name for name, value in values(Metrics().render().decode()).items() if value == 0}
    assert {"rejections_total{code=queue_full}", "rejections_total{code=invalid_json}"} <= shown
    assert {name for name in shown if name.startswith("errors_total")} == {
        f"errors_total{{code={code}}}"
        for code in (
            *("internal_error", "generation_failed", "engine_stopped", "deadline_exceeded"),
            *("model_load_failed", "insufficient_memory"),
        )
    }


def test_gauges_follow_the_engine() -> None:
    pipeline, metrics = fake_pipeline(), Metrics()
    engine = Engine({LaneName("fake-16"): pipeline}, max_rows=4, max_queue_images=8, metrics=metrics)
    gauges = ("num_requests_running", "num_requests_waiting", "queue_images", "active_slots")

    def shown() -> list[float]:
        now = values(metrics.render().decode())
        return [now[f"{name}{{device=cpu}}"] for name in gauges]

    tickets = [engine.submit(REQUEST) for _ in range(3)]
    assert shown() == [0, 3, 3, 0]
    engine.step()
    assert shown() == [2, 1, 1, 2]
    for ticket in tickets:
        engine.cancel(ticket)
    engine.step()
    assert shown() == [0, 0, 0, 0]
    now = values(metrics.render().decode())
    assert now["request_success_total{finished_reason=abort}"] == now["cancellations_total"] == 3
    engine.stop()


def test_rows_that_fill_a_step_up_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, metrics = fake_pipeline(), Metrics()
    monkeypatch.setattr(type(pipeline), "num_rows", lambda self, images, guided: images + guided + 3)
    engine = Engine({LaneName("fake-16"): pipeline}, max_rows=4, max_queue_images=8, metrics=metrics)
    engine.submit(REQUEST)
    engine.step()
    now = values(metrics.render().decode())
    assert (now["rows_total"], now["padded_rows_total"]) == (2, 3)
    engine.stop()


def test_what_is_served_and_on_what(client_of: ClientFactory) -> None:
    now = values(client_of(fake_pipeline("a"), fake_pipeline("b", resolution=32)).get("/metrics").text)
    assert now["model_loaded{model=a}"] == now["model_loaded{model=b}"] == 1
    assert [name for name in now if name.startswith("build_info{torch=2.")]
    metrics = Metrics()
    metrics.read_gpu_memory("cuda:1", {"allocated": lambda: 5.0, "total": lambda: 80.0})
    now = values(metrics.render().decode())
    assert now["gpu_memory_bytes{device=cuda:1,kind=allocated}"] == 5
    assert now["gpu_memory_bytes{device=cuda:1,kind=total}"] == 80


def test_labels_are_few_whatever_clients_send(client_of: ClientFactory) -> None:
    client = client_of()
    for number in range(20):
        client.get(f"/absent-{number}")
        client.get(f"/v1/models/absent-{number}")
        client.post(f"/generate?x={number}", json=BODY | {"class_id": f"absent-{number}"})
    series = [name for name in values(client.get("/metrics").text) if not name.startswith("python")]
    assert not [name for name in series if "absent" in name]
    assert {rows_label(rows) for rows in range(1, 5000)} == {*(str(2**power) for power in range(10)), "more"}
    assert {"stop", "abort", "error", "timeout"} == set(FINISHED_REASONS)


def test_rate_window_forgets_what_is_older_than_the_window() -> None:
    now = [100.0]
    window = RateWindow(60.0, clock=lambda: now[0])
    assert window.per_second() == 0.0
    for _ in range(10):
        window.add()
    assert window.per_second() == 10.0  # never a rate over less than a second
    now[0] += 20.0
    assert window.per_second() == pytest.approx(0.5)
    now[0] += 30.0
    for _ in range(5):
        window.add()
    now[0] += 30.0
    assert window.per_second() == pytest.approx(5 / 60)


def test_the_page_of_metrics_is_that_of_the_class(client_of: ClientFactory) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics_page(), "run `make docs`"
    assert "| `lamamba_requests_total` | counter | `route`, `status` | HTTP requests answered. |" in page
    families = text_string_to_metric_families(client_of().get("/metrics").text)
    scraped = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if not family.name.endswith("_created")
    }
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed == scraped
