"""POST /v1/images/generations: if this fails, programs written for OpenAI's Images API do not work."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from dataclasses import replace
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from model.diffusion.samplers import SAMPLERS
from model.images import read_metadata
from service.api.openai import ImagesRequest
from service.app import create_app
from service.server import DrainingServer, bind_socket
from service.settings import Settings
from tests.fakes import LABELS, fake_pipeline
from tests.service.conftest import ClientFactory, leave_at_third_step

openai = pytest.importorskip("openai", reason="openai is in the dev extra")

PATH = "/v1/images/generations"
TIMEOUT_S = 30.0
OURS: dict[str, Any] = {"steps": 4, "seed": 9}
BODY: dict[str, Any] = {"prompt": "venice square", **OURS}
UNUSED = {
    "quality": "auto",
    "background": "opaque",
    "moderation": "low",
    "style": "natural",
    "user": "somebody",
    "partial_images": 3,
    "response_format": "b64_json",
}


def official(client: TestClient) -> Any:
    return openai.OpenAI(
        base_url=f"{client.base_url}/v1", api_key="unused", http_client=client, max_retries=0
    )


def file_of(image: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def pixels(image: Any) -> np.ndarray:
    with file_of(image) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def alone(image_index: int = 0, resolution: int = 16) -> np.ndarray:
    made = fake_pipeline(resolution=resolution).generate(
        [2], seeds=[9], image_indices=[image_index], num_inference_steps=4, sampler="dpm++"
    )
    return made[0].numpy().astype(int)


def test_the_official_client_gets_the_pipelines_images(client: TestClient) -> None:
    answer = official(client).images.generate(prompt="Venice Square", n=3, extra_body=OURS)
    assert [image.revised_prompt for image in answer.data] == ["venice square"] * 3
    assert (answer.size, answer.output_format, answer.background) == ("16x16", "png", "opaque")
    assert answer.usage.total_tokens == 0
    assert answer.created > 1.7e9
    assert (answer.model, answer.class_id, answer.seed, answer.steps) == ("fake-16", 2, 9, 4)
    for index, image in enumerate(answer.data):
        assert np.abs(pixels(image) - alone(index)).max() <= 1
        assert (image.seed, image.image_index) == (9, index)
        assert read_metadata(base64.b64decode(image.b64_json))["image_index"] == str(index)


@pytest.mark.parametrize(
    ("fields", "side", "file_format"),
    [
        ({"size": "auto"}, 16, "PNG"),
        ({"size": "32x32"}, 32, "PNG"),
        ({"model": "fake-32", "size": "auto"}, 32, "PNG"),
        ({"output_format": "jpeg", "output_compression": 0}, 16, "JPEG"),
        ({"output_format": "webp", "output_compression": 100}, 16, "WEBP"),
        (UNUSED, 16, "PNG"),
        (dict.fromkeys(("model", "n", "size", "output_format", "stream", *UNUSED)), 16, "PNG"),
    ],
)
def test_fields_mean_what_openais_do(
    client: TestClient, fields: dict[str, Any], side: int, file_format: str
) -> None:
    answer = official(client).images.generate(prompt="2", extra_body=OURS | fields)
    assert answer.size == f"{side}x{side}"
    with file_of(answer.data[0]) as image:
        assert (image.size, image.format) == ((side, side), file_format)
    if file_format == "PNG":
        assert np.abs(pixels(answer.data[0]) - alone(resolution=side)).max() <= 1


def test_our_own_fields_are_generates(client: TestClient) -> None:
    fields: dict[str, Any] = {
        "cfg_scale": 4.0,
        "guidance_interval": [300, 999],
        "steps": 3,
        "sampler": "ddpm",
        "seed": 5,
        "image_index": 7,
    }
    answer = client.post(PATH, json={"prompt": 1} | fields).json()
    same = client.post("/generate", json={"class_id": 1} | fields).json()
    assert answer["data"][0]["b64_json"] == same["images"][0]["b64_json"]
    assert {name: answer[name] for name in fields.keys() - {"image_index"}} == {
        name: value for name, value in fields.items() if name != "image_index"
    }


def test_a_model_without_classes_takes_an_empty_prompt(client_of: ClientFactory) -> None:
    client = client_of(fake_pipeline("plain", num_classes=0))
    answer = client.post(PATH, json={"prompt": "", "steps": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["revised_prompt"] is None
    refusal = client.post(PATH, json={"prompt": "forest", "steps": 2})
    assert refusal.json()["error"]["message"] == 'prompt: "forest" given; this model accepts no class'


def test_a_stream_has_an_event_for_each_image(client: TestClient) -> None:
    events = list(
        official(client).images.generate(
            prompt="venice square", n=2, stream=True, partial_images=2, extra_body=OURS
        )
    )
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    for index in range(2):
        numbers = [event.partial_image_index for event in partial if event.image_index == index]
        assert numbers == [0, 1]
    for event in partial:
        assert isinstance(event, openai.types.ImageGenPartialImageEvent)
        assert pixels(event).shape == (16, 16, 3)
        assert (event.size, event.output_format, event.quality) == ("16x16", "png", "auto")
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert len(completed) == 2
    assert len(events) == len(completed) + len(partial)
    for index, event in enumerate(completed):
        assert isinstance(event, openai.types.ImageGenCompletedEvent)
        assert np.abs(pixels(event) - alone(index)).max() <= 1
        assert (event.size, event.output_format, event.quality) == ("16x16", "png", "auto")
        assert (event.background, event.usage.total_tokens, event.image_index) == ("opaque", 0, index)
        assert event.created_at > 1.7e9
    answer = client.post(PATH, json=BODY | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.startswith('event: image_generation.completed\ndata: {"type":"image_generation')


def test_partial_images_need_a_preview_map(client_of: ClientFactory) -> None:
    client = official(client_of(replace(fake_pipeline(), preview_map=None)))
    with pytest.raises(openai.BadRequestError, match=r"partial_images: 2 given; .*fit-previews") as refusal:
        client.images.generate(prompt="forest", stream=True, partial_images=2, extra_body=OURS)
    assert refusal.value.param == "partial_images"
    client.images.generate(prompt="forest", partial_images=2, extra_body=OURS)  # nothing to show them in


def test_the_first_event_comes_before_the_last_image_is_made() -> None:
    pipeline = fake_pipeline()
    settings = Settings(port=0, max_rows=2)  # one image at a time
    server = DrainingServer(create_app(settings, (pipeline,)), settings)
    network: Any = pipeline.network
    first_came = threading.Event()

    def ask(port: int) -> list[bool]:
        calls_before = len(network.rows_of_calls)

        def hold_the_second_image() -> None:
            if len(network.rows_of_calls) - calls_before == OURS["steps"]:
                assert first_came.wait(TIMEOUT_S)

        network.before_call = hold_the_second_image
        held = []
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused") as client:
            for _ in client.images.generate(prompt="forest", n=2, stream=True, extra_body=OURS):
                held.append(not first_came.is_set())
                first_came.set()
        return held

    async def run() -> list[bool]:
        with bind_socket("127.0.0.1", 0) as bound:
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.001)
            try:
                return await asyncio.wait_for(asyncio.to_thread(ask, bound.getsockname()[1]), TIMEOUT_S)
            finally:
                server.should_exit = True
                await asyncio.wait_for(serving, TIMEOUT_S)

    assert asyncio.run(run()) == [True, False]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_slot_back(stream: bool) -> None:
    pipeline = fake_pipeline()
    app = create_app(Settings(), (pipeline,))
    network: Any = pipeline.network

    async def talk() -> tuple[int, list[dict[str, Any]]]:
        calls_before = len(network.rows_of_calls)
        sent = await leave_at_third_step(app, network, PATH, BODY | {"steps": 1000, "stream": stream})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            neighbour = await client.post(PATH, json=BODY)
        assert neighbour.status_code == 200
        return len(network.rows_of_calls) - calls_before, sent

    async def run() -> tuple[int, list[dict[str, Any]]]:
        async with app.router.lifespan_context(app):
            return await asyncio.wait_for(talk(), TIMEOUT_S)

    calls, sent = asyncio.run(run())
    assert calls < 20
    assert [message.get("status") for message in sent] == [200 if stream else 499] + [None] * (not stream)
    assert app.state.runtime.idle


BAD_FIELDS = [
    pytest.param({"prompt": "vence squre"}, "prompt", "the nearest of 5 classes are 'venice", id="near"),
    pytest.param(
        {"prompt": 5}, "prompt", "5 given; this model accepts a class id from 0 to 4 or its label", id="class"
    ),
    pytest.param({"prompt": ""}, "prompt", '"" given; this model accepts a class id', id="empty"),
    pytest.param({"prompt": None}, "prompt", "null given; this model accepts a class id", id="null"),
    pytest.param({"prompt": "x" * 300}, "prompt", "given", id="long"),
    pytest.param({"prompt": ["forest"]}, "prompt", '["forest"] given', id="list"),
    pytest.param({"prompt": True}, "prompt", "true given", id="bool"),
    pytest.param({"prompt": "\ud800"}, "prompt", "given", id="surrogate"),
    pytest.param({"n": 0}, "n", "0 given; this model accepts 1 to 16", id="no-images"),
    pytest.param({"n": 17}, "n", "17 given; this model accepts 1 to 16", id="images"),
    pytest.param({"n": "2"}, "n", '"2" given; this model accepts an integer, 1 to 16', id="images-text"),
    pytest.param(
        {"size": "1024x1024"},
        "size",
        '"1024x1024" given; this server accepts auto, 16x16 or 32x32',
        id="size",
    ),
    pytest.param({"size": "16x32"}, "size", "accepts auto, 16x16 or 32x32", id="size-not-square"),
    pytest.param({"size": "big"}, "size", "accepts auto, 16x16 or 32x32", id="size-word"),
    pytest.param({"size": 16}, "size", "16 given; this model accepts auto, 16x16 or 32x32", id="size-number"),
    pytest.param(
        {"size": "32x32", "model": "fake-16"},
        "size",
        '"32x32" given; this model accepts auto or 16x16',
        id="both",
    ),
    pytest.param(
        {"model": "gpt-image-1"}, "model", '"gpt-image-1" given; this server accepts fake-16 or', id="model"
    ),
    pytest.param(
        {"response_format": "url"},
        "response_format",
        '"url" given; this model accepts b64_json alone',
        id="url",
    ),
    pytest.param({"output_format": "gif"}, "output_format", "accepts png, jpeg or webp", id="format"),
    pytest.param({"output_compression": 101}, "output_compression", "accepts 0 to 100", id="compression"),
    pytest.param({"output_compression": 1.5}, "output_compression", "an integer, 0 to 100", id="fraction"),
    pytest.param({"stream": "yes"}, "stream", '"yes" given; this model accepts true or false', id="stream"),
    pytest.param({"partial_images": 4}, "partial_images", "4 given; this model accepts 0 to 3", id="partial"),
    pytest.param({"user": 1}, "user", "1 given; this model accepts text", id="user"),
    pytest.param({"quality": "hd"}, "quality", '"hd" given; this model accepts auto or', id="quality"),
    pytest.param({"background": "transparent"}, "background", "accepts auto or opaque", id="background"),
    pytest.param({"moderation": "high"}, "moderation", "accepts auto or low", id="moderation"),
    pytest.param({"style": "vivid"}, "style", '"vivid" given; this model accepts natural', id="style"),
    pytest.param({"steps": 5000}, "steps", "5000 given; this model accepts 1 to 1000", id="steps"),
    pytest.param({"cfg_scale": 0.5}, "cfg_scale", "0.5 given; this model accepts 1 to 20", id="cfg"),
    pytest.param({"guidance_interval": [9, 8]}, "guidance_interval", "[9, 8] given", id="interval"),
    pytest.param({"cfg_scale": "2"}, "cfg_scale", "accepts a number, 1 to 20", id="cfg-text"),
    pytest.param({"sampler": "euler"}, "sampler", "accepts ddpm, ddim or dpm++", id="sampler"),
    pytest.param({"seed": -1}, "seed", "-1 given; this model accepts 0 to", id="seed"),
    pytest.param({"image_index": -1}, "image_index", "-1 given", id="image-index"),
    pytest.param(
        {"negative_prompt": "x"}, "negative_prompt", "request accepts prompt, model, n", id="unknown"
    ),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD_FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_400_and_names_field_value_and_what_is_accepted(
    client: TestClient, change: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    content = json.dumps(BODY | {"stream": stream} | change)
    answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(f"{param}: ")
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["code"] == ("unknown_field" if param == "negative_prompt" else "invalid_field")


@pytest.mark.parametrize(
    ("content", "content_type", "status", "param", "code"),
    [
        pytest.param(b'{"prompt": 1', "application/json", 400, None, "invalid_json", id="cut"),
        pytest.param(b"", "application/json", 400, "body", "invalid_field", id="empty"),
        pytest.param(b"[1]", "application/json", 400, "body", "invalid_field", id="list"),
        pytest.param(b"{}", "application/json", 400, "prompt", "invalid_field", id="no-prompt"),
        pytest.param(b"\xff\xfe", "application/json", 400, None, "invalid_json", id="not-text"),
        pytest.param(b'{"prompt": 1}', "text/plain", 415, None, "unsupported_media_type", id="text"),
        pytest.param(b" " * 70000, "application/json", 413, None, "payload_too_large", id="large"),
    ],
)
def test_bodies_that_are_no_request_are_refused_in_openais_shape(
    client: TestClient, content: bytes, content_type: str, status: int, param: str | None, code: str
) -> None:
    answer = client.post(PATH, content=content, headers={"Content-Type": content_type})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", PATH, 405, "method_not_allowed"),
        ("POST", "/v1/images/edits", 404, "not_found"),
        ("GET", "/v1/images", 404, "not_found"),
    ],
)
def test_other_paths_and_methods_are_refused_in_openais_shape(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert set(client.get("/v1/imagesque").json()["error"]) == {"code", "message", "request_id"}


def test_the_official_client_raises_what_it_should(client_of: ClientFactory) -> None:
    pipeline = fake_pipeline()
    client = official(client_of(pipeline, max_queue_images=2))
    with pytest.raises(openai.BadRequestError, match="the nearest of 5 classes are 'venice") as bad:
        client.images.generate(prompt="vence squre")
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        *("prompt", "invalid_field", "invalid_request_error"),
    )
    assert bad.value.request_id
    with pytest.raises(openai.RateLimitError, match="queue: 0 images wait and 3 more were given") as full:
        client.images.generate(prompt="forest", n=3, extra_body=OURS)
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert (full.value.code, full.value.type) == ("queue_full", "rate_limit_error")
    pipeline.network.failing_label = 3  # type: ignore[attr-defined]
    with pytest.raises(openai.InternalServerError, match="failed for this request") as failed:
        client.images.generate(prompt="bathroom", extra_body=OURS)
    assert (failed.value.status_code, failed.value.code) == (500, "generation_failed")
    with pytest.raises(openai.APIError, match="failed for this request"):
        list(client.images.generate(prompt="bathroom", n=2, stream=True, extra_body=OURS))
    with pytest.raises(openai.NotFoundError, match="this server has fake-16"):
        client.models.retrieve("other")


def test_errors_have_openais_shape_under_a_root_path_too(client_of: ClientFactory) -> None:
    client = client_of(root_path="/images-api")
    for prefix in ("", "/images-api"):
        answer = client.post(prefix + PATH, json=BODY | {"n": 0})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "n"


def test_the_samplers_are_those_that_there_are() -> None:
    literal, none = get_args(ImagesRequest.model_fields["sampler"].annotation)
    assert (get_args(literal), none) == (SAMPLERS, type(None))


def test_a_draining_server_answers_503_in_openais_shape(client_of: ClientFactory) -> None:
    client = client_of()
    client.app.state.runtime.drain()  # type: ignore[attr-defined]
    answer = client.post(PATH, json=BODY)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert answer.json()["error"]["code"] == "draining"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_defect_is_500_in_openais_shape(client_of: ClientFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bytes:
        raise RuntimeError("a secret")

    monkeypatch.setattr("service.api.answering.encode_image", broken)
    answer = client_of().post(PATH, json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "internal error; the server's log has the reason under this id",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


def test_the_official_client_lists_the_models(client: TestClient) -> None:
    models = official(client).models
    listed = list(models.list())
    assert [model.id for model in listed] == ["fake-16", "fake-32"]
    assert all((model.object, model.owned_by) == ("model", "lamamba") for model in listed)
    assert all(isinstance(model.created, int) for model in listed)
    assert models.retrieve("fake-32").labels == list(LABELS)


def test_the_schema_documents_what_is_answered(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    responses = schema["paths"][PATH]["post"]["responses"]
    assert set(responses) == {
        *("200", "400", "408", "413", "415", "422", "429", "500", "503", "504", "default")
    }
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    reference = responses["429"]["content"]["application/json"]["schema"]["$ref"]
    assert reference.endswith("/OpenAIErrorBody")
    fields = schema["components"]["schemas"]["ImagesRequest"]["properties"]
    assert all(field.get("description") for field in fields.values())
