"""Events of POST /generate: if this fails, people watch a page that stands still, or that shows the wrong
image being made."""

from __future__ import annotations

import base64
import io
import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from model.diffusion.samplers import SAMPLERS
from service.engine.engine import Engine
from service.engine.request import LaneName, Preview, Ticket
from service.metrics import Metrics
from tests.fakes import fake_pipeline
from tests.service.conftest import ClientFactory
from tests.service.engine_requests import REQUEST, TIMEOUT_S

EVENTS = {"Accept": "text/event-stream"}
BODY: dict[str, Any] = {"class_id": 2, "steps": 6, "seed": 9}


class Recorder:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.ticket: Ticket | None = None
        self.previews: list[Preview] = []
        self.positions: list[int | None] = []

    def changed(self, previews: Any) -> None:
        self.previews += previews
        if self.ticket is not None and self.ticket.started_at is None:
            self.positions.append(self.ticket.queue_position)


def events_of(client: TestClient, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    answer = client.post("/generate", json=body, headers=EVENTS)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    return [
        (kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for kind, data in (part for part in parts if not part[0].startswith(":"))
    ]


def test_the_result_is_the_json_without_streaming(client: TestClient) -> None:
    body = BODY | {"num_images": 2, "format": "webp"}
    kind, result = events_of(client, body)[-1]
    plain = client.post("/generate", json=body).json()
    assert kind == "result"
    assert result.keys() == plain.keys()
    different = {"request_id", "timings", "created"}
    assert {k: v for k, v in result.items() if k not in different} == {
        k: v for k, v in plain.items() if k not in different
    }


def test_progress_counts_the_steps_of_each_image_up(client: TestClient) -> None:
    events = events_of(client, BODY | {"num_images": 3, "steps": 40})
    counts = [data["steps_done"] for kind, data in events if kind == "progress"]
    assert counts == sorted(counts)
    assert counts[-1] == [40] * 3
    assert {data["steps"] for kind, data in events if kind == "progress"} == {40}
    assert {kind for kind, _ in events} <= {"queued", "progress", "result"}  # previews only where asked for


def test_previews_are_of_the_image_and_come_nearer_to_it(client: TestClient) -> None:
    events = events_of(client, BODY | {"num_images": 2, "steps": 20, "previews": 4})
    previews = [data for kind, data in events if kind == "preview"]
    assert events[-1][0] == "result"
    for index in range(2):
        own = [preview for preview in previews if preview["index"] == index]
        assert [preview["preview_index"] for preview in own] == [0, 1, 2, 3]
        assert [preview["steps_done"] for preview in own] == [4, 8, 12, 16]
        pictures = []
        for preview in own:
            with Image.open(io.BytesIO(base64.b64decode(preview["b64_json"]))) as picture:
                assert (picture.size, picture.format) == ((4, 4), "PNG")
                pictures.append(np.asarray(picture).astype(float))
        made = fake_pipeline()
        final = made.preview(
            made.sample_latents([2], seeds=[9], image_indices=[index], num_inference_steps=20)
        )[0].numpy()
        distances = [np.abs(picture - final).mean() for picture in pictures]
        assert distances[-1] < distances[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_has_previews(client: TestClient, sampler: str) -> None:
    events = events_of(client, BODY | {"sampler": sampler, "previews": 2})
    assert [kind for kind, _ in events].count("preview") == 2


def test_previews_are_spread_evenly_over_the_steps() -> None:
    for steps in (*range(1, 30), 250, 1000):
        for previews in range(60):
            request = replace(REQUEST, num_inference_steps=steps, num_previews=previews)
            due = [request.preview_index(done) for done in range(steps + 1)]
            assert due[0] is None
            assert due[-1] is None
            numbers = [index for index in due if index is not None]
            assert numbers == list(range(min(previews, steps - 1)))
            gaps = np.diff([0, *(done for done, index in enumerate(due) if index is not None), steps])
            assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("previews", "accepted"),
    [(-1, "0 to 50"), (51, "0 to 50"), ("3", "an integer, 0 to 50"), (1.5, "an integer, 0 to 50")],
)
def test_previews_out_of_range_are_refused(client: TestClient, previews: Any, accepted: str) -> None:
    answer = client.post("/generate", json=BODY | {"previews": previews}, headers=EVENTS)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["field"], error["accepted"]) == ("previews", accepted)


def test_previews_without_events_are_refused(client: TestClient) -> None:
    error = client.post("/generate", json=BODY | {"previews": 2}).json()["error"]
    assert error["message"] == (
        "previews: 2 given; this request accepts 0 unless its Accept header is text/event-stream"
    )


def test_a_model_without_a_map_says_how_to_make_one(client_of: ClientFactory) -> None:
    client = client_of(replace(fake_pipeline(), preview_map=None))
    answer = client.post("/generate", json=BODY | {"previews": 2}, headers=EVENTS)
    assert answer.status_code == 422
    assert "it has no preview map, which `lamamba fit-previews FOLDER` makes" in answer.text
    assert client.get("/v1/models").json()["data"][0]["limits"]["previews"]["maximum"] == 0
    assert events_of(client, BODY)[-1][0] == "result"


def test_a_failure_after_the_start_is_an_event_in_our_shape(client_of: ClientFactory) -> None:
    pipeline = fake_pipeline()
    client = client_of(pipeline)
    network: Any = pipeline.network
    network.failing_label = 2
    kind, data = events_of(client, BODY)[-1]
    assert kind == "error"
    assert data["error"]["code"] == "generation_failed"
    assert data["error"]["request_id"]
    late = events_of(client, BODY | {"class_id": 1, "timeout_s": 1e-6})[-1]
    assert (late[0], late[1]["error"]["code"]) == ("error", "deadline_exceeded")


def test_mistakes_before_the_start_have_their_status(client: TestClient) -> None:
    answer = client.post("/generate", json=BODY | {"steps": 0}, headers=EVENTS)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "steps")


def test_who_waits_hears_its_place_in_the_queue() -> None:
    pipeline = fake_pipeline()
    engine = Engine({LaneName("fake-16"): pipeline}, max_rows=2, max_queue_images=64, metrics=Metrics())
    network: Any = pipeline.network
    engine.start()
    submitted = threading.Event()
    network.before_call = lambda: submitted.wait(TIMEOUT_S)
    try:
        first = engine.submit(REQUEST)
        second = engine.submit(replace(REQUEST, priority="low"))
        last = Recorder()
        last.ticket = engine.submit(replace(REQUEST, priority="low", seed=12), last)
        urgent = engine.submit(replace(REQUEST, priority="high"))
        submitted.set()
        for ticket in (first, second, urgent, last.ticket):
            ticket.jobs[0].result.result(TIMEOUT_S)
    finally:
        engine.stop()
    assert last.positions == [3, 2, 1]


def test_a_broken_preview_costs_no_image(client_of: ClientFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no pictures")

    monkeypatch.setattr("model.preview.PreviewMap.__call__", broken)
    kinds = [kind for kind, _ in events_of(client_of(), BODY | {"previews": 3})]
    assert (kinds[-1], "preview" in kinds) == ("result", False)
