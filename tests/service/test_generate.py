"""POST /generate: if this fails, clients get wrong images, or no word on why they get none."""

from __future__ import annotations

import asyncio
import base64
import difflib
import io
import json
from typing import Any, get_args

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from model.diffusion.samplers import SAMPLERS
from model.images import read_metadata
from service.api.schemas import GenerateRequest
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, Ticket
from tests.fakes import LABELS, fake_pipeline
from tests.service.conftest import ClientFactory

PNG = {"Accept": "image/png"}
BODY: dict[str, Any] = {"class_id": 2, "steps": 4, "seed": 9}


def pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def post(client: TestClient, body: Any, **headers: str) -> Any:
    return client.post("/generate", json=body, headers=headers)


def alone(body: dict[str, Any], image_index: int = 0, resolution: int = 16) -> np.ndarray:
    made = fake_pipeline(resolution=resolution).generate(
        [body["class_id"]],
        seeds=[body["seed"]],
        image_indices=[image_index],
        guidance_scale=body.get("cfg_scale"),
        guidance_interval=body.get("guidance_interval"),
        num_inference_steps=body["steps"],
        sampler=body.get("sampler", "dpm++"),
    )
    return made[0].numpy().astype(int)


def test_generate_gives_the_pipelines_image_as_png(client: TestClient) -> None:
    answer = client.post("/generate", json=BODY, headers=PNG)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert np.abs(pixels(answer.content) - alone(BODY)).max() <= 1
    assert answer.headers["x-lamamba-seed"] == "9"
    assert answer.headers["x-lamamba-class-label"] == "venice square"
    assert answer.headers["x-lamamba-steps"] == "4"
    assert answer.headers["x-lamamba-sampler"] == "dpm++"
    assert answer.headers["x-request-id"]
    stages = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert stages == ["queue", "denoise", "decode", "encode", "total"]
    assert read_metadata(answer.content) == {
        "seed": "9",
        "image_index": "0",
        "class": "venice square",
        "cfg": "2.5",
        "steps": "4",
        "sampler": "dpm++",
        "model": "fake-16",
        "weights": "0123456789ab",
        "Software": "LaMamba",
    }


def test_generate_gives_several_images_as_json_each_reproducible_alone(client: TestClient) -> None:
    body = BODY | {"num_images": 3, "sampler": "ddpm", "cfg_scale": 4.0}
    answer = post(client, body).json()
    assert answer["seeds"] == [9, 9, 9]
    assert [image["image_index"] for image in answer["images"]] == [0, 1, 2]
    assert {
        key: answer[key] for key in ("model", "class_id", "class_label", "cfg_scale", "steps", "format")
    } == {
        "model": "fake-16",
        "class_id": 2,
        "class_label": "venice square",
        "cfg_scale": 4.0,
        "steps": 4,
        "format": "png",
    }
    assert list(answer["timings"]) == ["queue", "denoise", "decode", "encode", "total"]
    assert all(seconds >= 0 for seconds in answer["timings"].values())
    for image in answer["images"]:
        made = pixels(base64.b64decode(image["b64_json"]))
        assert np.abs(made - alone(body, image["image_index"])).max() <= 1
    again = post(client, body | {"num_images": 1, "image_index": 2}, Accept="image/png")
    assert np.abs(pixels(again.content) - alone(body, 2)).max() <= 1
    assert again.headers["x-lamamba-image-index"] == "2"


def test_generate_guides_within_the_interval_alone(client: TestClient) -> None:
    body = BODY | {"cfg_scale": 6.0, "steps": 8, "guidance_interval": [200, 700]}
    answer = post(client, body, **PNG)
    made = pixels(answer.content)
    assert np.abs(made - alone(body)).max() <= 1
    assert np.abs(made - alone(body | {"guidance_interval": None})).max() > 1
    assert answer.headers["x-lamamba-guidance-interval"] == "200-700"
    assert read_metadata(answer.content)["cfg_interval"] == "200-700"
    assert post(client, body).json()["guidance_interval"] == [200, 700]
    assert post(client, BODY).json()["guidance_interval"] is None


def test_generate_without_a_seed_draws_and_reports_one(client: TestClient) -> None:
    body = {"class_id": 0, "steps": 3}
    first, second = post(client, body).json(), post(client, body).json()
    assert first["seed"] != second["seed"]
    again = post(client, body | {"seed": first["seed"]}).json()
    assert again["images"][0]["b64_json"] == first["images"][0]["b64_json"]


@pytest.mark.parametrize("class_id", [2, "venice square", "Venice Square "], ids=str)
def test_generate_takes_a_class_by_id_or_label(client: TestClient, class_id: int | str) -> None:
    assert post(client, BODY | {"class_id": class_id}).json()["class_id"] == 2


@pytest.mark.parametrize(("resolution", "model"), [(16, "fake-16"), (32, "fake-32"), (None, "fake-16")])
def test_generate_picks_the_model_by_resolution(client: TestClient, resolution: int, model: str) -> None:
    answer = post(client, BODY | {"resolution": resolution}).json()
    assert answer["model"] == model
    made = pixels(base64.b64decode(answer["images"][0]["b64_json"]))
    assert made.shape[0] == answer["resolution"] == int(model.removeprefix("fake-"))


@pytest.mark.parametrize(
    ("accept", "fields", "content_type"),
    [
        pytest.param("*/*", {}, "application/json", id="anything"),
        pytest.param("image/*", {}, "image/png", id="any-image"),
        pytest.param("image/webp", {}, "image/webp", id="named-by-accept"),
        pytest.param("image/*", {"format": "jpeg", "quality": 40}, "image/jpeg", id="named-by-format"),
        pytest.param("application/json, image/png;q=0.5", {}, "application/json", id="weights"),
        pytest.param("application/json;q=0.2, image/png;q=0.5", {}, "image/png", id="weights-image"),
        pytest.param("text/html", {}, "application/json", id="unservable"),
        pytest.param("image/png", {"num_images": 2}, "application/json", id="several-images"),
        pytest.param("image/png;q=nonsense", {}, "application/json", id="broken-weight"),
    ],
)
def test_generate_negotiates_the_representation(
    client: TestClient, accept: str, fields: dict[str, Any], content_type: str
) -> None:
    answer = post(client, BODY | fields, Accept=accept)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == content_type


def test_generate_schema_names_the_samplers_that_there_are() -> None:
    annotation = GenerateRequest.model_fields["sampler"].annotation
    assert get_args(annotation) == SAMPLERS


BAD_FIELDS = [
    pytest.param(
        {"class_id": 5}, "class_id", "5 given; this model accepts a class id from 0 to 4", id="class"
    ),
    pytest.param({"class_id": -1}, "class_id", "-1 given", id="class-negative"),
    pytest.param({"class_id": "vence squre"}, "class_id", "'venice square'", id="class-near"),
    pytest.param({"class_id": "x" * 300}, "class_id", "given", id="class-long"),
    pytest.param({"class_id": "9" * 150}, "class_id", "given", id="class-digits"),
    pytest.param({"class_id": "\ud800"}, "class_id", "given", id="class-surrogate"),
    pytest.param({"class_id": None}, "class_id", "null given", id="class-null"),
    pytest.param({"class_id": 1.5}, "class_id", "1.5 given", id="class-float"),
    pytest.param({"class_id": True}, "class_id", "true given", id="class-bool"),
    pytest.param({"class_id": [1]}, "class_id", "[1] given", id="class-list"),
    pytest.param({"cfg_scale": 0.5}, "cfg_scale", "0.5 given; this model accepts 1 to 20", id="cfg-low"),
    pytest.param({"cfg_scale": 20.5}, "cfg_scale", "20.5 given; this model accepts 1 to 20", id="cfg-high"),
    pytest.param(
        {"cfg_scale": "2"}, "cfg_scale", '"2" given; this model accepts a number, 1 to 20', id="cfg-text"
    ),
    pytest.param(
        {"guidance_interval": [700, 200]},
        "guidance_interval",
        "[700, 200] given; this model accepts two timesteps from 0 to 999, the lower one first",
        id="interval-reversed",
    ),
    pytest.param({"guidance_interval": [0, 1000]}, "guidance_interval", "0 to 999", id="interval-beyond"),
    pytest.param({"guidance_interval": [5]}, "guidance_interval", "[5] given", id="interval-short"),
    pytest.param({"guidance_interval": [0.1, 0.5]}, "guidance_interval", "0.1 given", id="interval-fraction"),
    pytest.param({"guidance_interval": "all"}, "guidance_interval", '"all" given', id="interval-text"),
    pytest.param({"steps": 0}, "steps", "0 given; this model accepts 1 to 1000", id="steps-zero"),
    pytest.param({"steps": 5000}, "steps", "5000 given; this model accepts 1 to 1000", id="steps-many"),
    pytest.param(
        {"steps": "20"}, "steps", '"20" given; this model accepts an integer, 1 to 1000', id="steps-text"
    ),
    pytest.param({"steps": 20.0}, "steps", "20.0 given", id="steps-float"),
    pytest.param({"steps": True}, "steps", "true given", id="steps-bool"),
    pytest.param({"steps": 10**40}, "steps", "given; this model accepts 1 to 1000", id="steps-huge"),
    pytest.param(
        {"resolution": 512}, "resolution", "512 given; this server accepts 16 or 32", id="resolution"
    ),
    pytest.param({"num_images": 0}, "num_images", "0 given; this model accepts 1 to 16", id="no-images"),
    pytest.param(
        {"num_images": 10**9}, "num_images", "1000000000 given; this model accepts 1 to 16", id="images"
    ),
    pytest.param(
        {"sampler": "euler"}, "sampler", '"euler" given; this model accepts ddpm, ddim or dpm++', id="sampler"
    ),
    pytest.param({"seed": -1}, "seed", "-1 given; this model accepts 0 to", id="seed-negative"),
    pytest.param(
        {"seed": 2**63}, "seed", "given; this model accepts 0 to 9223372036854775807", id="seed-large"
    ),
    pytest.param({"image_index": -1}, "image_index", "-1 given", id="image-index"),
    pytest.param(
        {"format": "gif"}, "format", '"gif" given; this model accepts png, jpeg or webp', id="format"
    ),
    pytest.param({"quality": 101}, "quality", "101 given; this model accepts 1 to 100", id="quality"),
    pytest.param(
        {"priority": "urgent"},
        "priority",
        '"urgent" given; this model accepts high, normal or low',
        id="priority",
    ),
    pytest.param({"priority": 1}, "priority", "1 given", id="priority-number"),
    pytest.param({"priority": None}, "priority", "null given", id="priority-null"),
    pytest.param(
        {"timeout_s": 0},
        "timeout_s",
        "0.0 given; this model accepts above 0 and up to 600 seconds",
        id="timeout-none",
    ),
    pytest.param({"timeout_s": -1.5}, "timeout_s", "-1.5 given", id="timeout-negative"),
    pytest.param({"timeout_s": 600.5}, "timeout_s", "600.5 given", id="timeout-long"),
    pytest.param(
        {"timeout_s": "5"},
        "timeout_s",
        '"5" given; this model accepts a number, above 0 and up to 600 seconds',
        id="timeout-text",
    ),
    pytest.param({"timeout_s": True}, "timeout_s", "true given", id="timeout-bool"),
    pytest.param({"timeout_s": 10**400}, "timeout_s", "given", id="timeout-huge"),
    pytest.param(
        {"model": "other"}, "model", '"other" given; this server accepts fake-16 or fake-32', id="model"
    ),
    pytest.param(
        {"model": "fake-16", "resolution": 32}, "resolution", "32 given; this model accepts 16", id="both"
    ),
    pytest.param({"stepz": 4}, "stepz", "4 given; this request accepts class_id, cfg_scale", id="unknown"),
    pytest.param({"body": 4}, "body", "4 given; this request accepts class_id", id="unknown-body"),
]


@pytest.mark.parametrize(
    ("path", "field"),
    [("/generate", "class_id"), ("/v1/images/generations", "prompt")],
    ids=["ours", "openai"],
)
def test_the_search_for_near_labels_does_not_hold_up_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, field: str
) -> None:
    on_the_loop: list[bool] = []
    search = difflib.get_close_matches

    def watched(*args: Any, **options: Any) -> list[str]:
        on_the_loop.append(asyncio._get_running_loop() is not None)
        return search(*args, **options)

    monkeypatch.setattr("model.pipeline.difflib.get_close_matches", watched)
    assert "venice square" in client.post(path, json={field: "vence squre"}).text
    assert on_the_loop == [False]


@pytest.mark.parametrize(("change", "field", "message"), BAD_FIELDS)
def test_generate_names_field_value_and_accepted_range(
    client: TestClient, change: dict[str, Any], field: str, message: str
) -> None:
    body = json.dumps(BODY | change)
    answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["field"] == field
    assert error["message"].startswith(f"{field}: ")
    assert message in error["message"]
    assert error["accepted"] in error["message"]
    assert "value" in error
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["code"] == ("unknown_field" if field in ("stepz", "body") else "invalid_field")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_generate_refuses_numbers_that_are_none(client: TestClient, number: str) -> None:
    for field in ("cfg_scale", "steps", "seed", "class_id", "timeout_s"):
        body = json.dumps(BODY | {field: 0}).replace(f'"{field}": 0', f'"{field}": {number}')
        answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["field"] == field


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        pytest.param(b'{"class_id": 1', "application/json", 400, "invalid_json", id="cut"),
        pytest.param(b"", "application/json", 422, "invalid_field", id="empty"),
        pytest.param(b"hello", "application/json", 400, "invalid_json", id="not-json"),
        pytest.param(b"\xff\xfe\x00", "application/json", 400, "invalid_json", id="not-text"),
        pytest.param(b"[" * 5000, "application/json", 400, "invalid_json", id="deep"),
        pytest.param(
            b'{"steps": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json", id="digits"
        ),
        pytest.param(b"[1]", "application/json", 422, "invalid_field", id="list"),
        pytest.param(b"null", "application/json", 422, "invalid_field", id="null"),
        pytest.param(b'{"class_id": 1}', "text/plain", 415, "unsupported_media_type", id="media-type"),
        pytest.param(
            b"class_id=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type", id="form"
        ),
    ],
)
def test_generate_refuses_bodies_that_are_no_json_object(
    client: TestClient, content: bytes, content_type: str, status: int, code: str
) -> None:
    answer = client.post("/generate", content=content, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert "Traceback" not in answer.text


def test_generate_413_is_for_large_bodies_alone_declared_or_chunked(client_of: ClientFactory) -> None:
    client = client_of(max_body_bytes=300)
    headers = {"Content-Type": "application/json"}
    padded = json.dumps(BODY).encode()
    within = padded + b" " * (300 - len(padded))
    assert client.post("/generate", content=within, headers=headers).status_code == 200
    for content in (within + b" ", iter([within, b" "])):
        answer = client.post("/generate", content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "payload_too_large"
        assert "accepts 300 bytes" in answer.json()["error"]["message"]


def test_generate_format_and_accept_must_not_contradict(client: TestClient) -> None:
    answer = post(client, BODY | {"format": "jpeg"}, Accept="image/png")
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "format"


def test_generate_unconditional_model_takes_no_class_and_no_guidance(client_of: ClientFactory) -> None:
    client = client_of(fake_pipeline("plain", num_classes=0))
    answer = post(client, {"steps": 2, "seed": 1}).json()
    assert (answer["class_id"], answer["class_label"], answer["cfg_scale"]) == (None, None, 1.0)
    for change in ({"class_id": 0}, {"cfg_scale": 2.0}, {"guidance_interval": [0, 999]}):
        (field,) = change
        refusal = post(client, {"steps": 2} | change)
        assert refusal.status_code == 422
        assert refusal.json()["error"]["field"] == field


def test_generate_two_models_of_one_resolution_need_a_name(client_of: ClientFactory) -> None:
    client = client_of(fake_pipeline("a"), fake_pipeline("b"))
    refusal = post(client, BODY | {"resolution": 16})
    assert refusal.status_code == 422
    assert refusal.json()["error"]["accepted"] == "a or b at resolution 16"
    assert post(client, BODY | {"model": "b"}).json()["model"] == "b"


def test_generate_failure_answers_500_with_a_request_id_and_no_trace(client_of: ClientFactory) -> None:
    pipeline = fake_pipeline()
    client = client_of(pipeline)
    pipeline.network.failing_label = 3  # type: ignore[attr-defined]
    answer = post(client, BODY | {"class_id": 3}, **{"X-Request-ID": "mine-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "generation_failed"
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert "device" not in answer.text
    assert "Traceback" not in answer.text
    assert post(client, BODY).status_code == 200


def test_generate_full_queue_answers_429_with_retry_after(client_of: ClientFactory) -> None:
    client = client_of(max_queue_images=2)
    answer = post(client, BODY | {"num_images": 3})
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1


def test_generate_out_of_time_answers_504_and_says_how_far_it_got(client_of: ClientFactory) -> None:
    client = client_of(max_timeout_s=5.0)
    answer = post(client, BODY | {"steps": 1000, "num_images": 16, "timeout_s": 0.02})
    assert answer.status_code == 504, answer.text
    error = answer.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert error["message"].startswith("timeout_s: 0.02 s have passed; the request waited ")
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["queue_s"] >= 0
    assert error["steps_done"] < error["steps"] == 16_000
    assert post(client, BODY | {"timeout_s": 5}).status_code == 200
    assert "lamamba_deadline_exceeded_total" in client.get("/metrics").text


def test_generate_timeout_is_the_servers_where_none_is_given(client_of: ClientFactory) -> None:
    client = client_of(max_timeout_s=30.0, default_timeout_s=0.02)
    slow = BODY | {"steps": 1000, "num_images": 16}
    assert post(client, slow).status_code == 504
    assert post(client, BODY | {"timeout_s": 30}).status_code == 200
    limits = client.get("/v1/models").json()["data"][0]["limits"]
    assert limits["timeout_s"] == {"maximum": 30.0, "default": 0.02}
    assert limits["priorities"] == ["high", "normal", "low"]


def test_generate_hands_priority_and_timeout_to_the_engine(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GenerationRequest] = []
    submit = Engine.submit

    def note(engine: Engine, request: GenerationRequest, *watcher: None) -> Ticket:
        asked.append(request)
        return submit(engine, request, *watcher)

    monkeypatch.setattr(Engine, "submit", note)
    post(client, BODY)
    post(client, BODY | {"priority": "high", "timeout_s": 9})
    assert [(request.priority, request.timeout_s) for request in asked] == [("normal", None), ("high", 9.0)]


def test_generate_ignores_a_request_id_that_is_no_word(client: TestClient) -> None:
    answer = post(client, BODY, **{"X-Request-ID": "a b\tc"})
    assert answer.headers["x-request-id"] != "a b\tc"
    assert len(answer.headers["x-request-id"]) == 24


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/generate", 405, "method_not_allowed"), ("GET", "/nowhere", 404, "not_found")],
)
def test_other_errors_have_the_same_shape(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert path in answer.json()["error"]["message"]


def test_models_are_openais_list_ascending_by_id(client: TestClient) -> None:
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list"
    assert [model["id"] for model in listing["data"]] == ["fake-16", "fake-32"]
    first = listing["data"][0]
    assert {"id", "object", "created", "owned_by"} <= set(first)
    assert first["object"] == "model"
    assert first["labels"] == list(LABELS)
    assert (first["device"], first["dtype"], first["scan_backend"]) == ("cpu", "float32", "reference")
    assert first["limits"]["steps"] == {
        "minimum": 1,
        "maximum": 1000,
        "default": {"ddpm": 250, "ddim": 50, "dpm++": 20},
    }
    assert first["limits"]["cfg_scale"] == {"minimum": 1.0, "maximum": 20.0, "default": 2.5}


def test_docs_and_version(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    assert client.get("/version").json()["version"]
    schema = client.get("/openapi.json").json()
    assert "504" in schema["paths"]["/generate"]["post"]["responses"]
    assert {"/generate", "/v1/models", "/health/live", "/health/ready", "/metrics"} <= set(schema["paths"])


def test_a_number_too_long_to_read_is_named_as_that(client: TestClient) -> None:
    answer = client.post(
        "/generate",
        content='{"class_id": 0, "num_images": ' + "9" * 5000 + "}",
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "body: a number too long to read given; up to 4300 digits are accepted"
    )


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("text/json", 415),
        ("application/xjson", 415),
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
    ],
)
def test_json_is_application_json_or_a_type_made_of_it(
    client: TestClient, content_type: str, status: int
) -> None:
    answer = client.post(
        "/generate", content='{"class_id": 0, "steps": 1}', headers={"content-type": content_type}
    )
    assert answer.status_code == status, answer.text


def test_a_digit_of_another_script_is_no_class_id(client: TestClient) -> None:
    answer = client.post("/generate", json={"class_id": "\u0663", "steps": 1})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "class_id")


def test_without_a_resolution_the_smallest_is_taken(client_of: ClientFactory) -> None:
    client = client_of(fake_pipeline("fake-32", resolution=32), fake_pipeline())
    answer = client.post("/generate", json={"class_id": 0, "steps": 1})
    assert (answer.json()["model"], answer.json()["resolution"]) == ("fake-16", 16)
