"""What all answers have in common: if this fails, browsers and proxies in front of the server break it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch

from service.api.generate import FACT_HEADERS
from tests.service.conftest import ClientFactory

ORIGIN = "https://pages.example.org"
BODY: dict[str, Any] = {"class_id": 2, "steps": 1, "seed": 9}


def test_every_answer_says_that_its_type_is_not_to_be_guessed(client_of: ClientFactory) -> None:
    client = client_of()
    for method, path in (("GET", "/version"), ("GET", "/absent"), ("POST", "/generate"), ("GET", "/metrics")):
        assert client.request(method, path).headers["x-content-type-options"] == "nosniff", path


def test_version_says_what_answers_and_what_it_runs_on(client_of: ClientFactory) -> None:
    answer = client_of().get("/version").json()
    assert (answer["version"], answer["torch"]) == (version("lamamba"), torch.__version__)
    assert answer["models"] == [
        {
            "id": "fake-16",
            "device": "cpu",
            "dtype": "float32",
            "scan_backend": "reference",
            "weights_hash": "0123456789ab",
        }
    ]


def test_without_a_setting_no_other_origin_is_let_in(client_of: ClientFactory) -> None:
    client = client_of()
    assert "access-control-allow-origin" not in client.get("/version", headers={"Origin": ORIGIN}).headers
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert client.options("/generate", headers=preflight).status_code == 405


def test_the_origins_of_the_setting_are_let_in_and_no_others(client_of: ClientFactory) -> None:
    client = client_of(cors_origins=f"{ORIGIN}, http://localhost:3000", api_keys=f"a:{'0' * 64}")
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, idempotency-key",
    }
    allowed = client.options("/generate", headers=preflight | {"Origin": ORIGIN})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert client.options("/generate", headers=preflight | {"Origin": "https://x.example"}).status_code == 400
    refused = client.post("/generate", json=BODY, headers={"Origin": ORIGIN})  # a page can read the 401
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_pages_can_read_the_facts_of_an_image(client_of: ClientFactory) -> None:
    client = client_of(cors_origins="*")
    answer = client.post(
        "/generate",
        json=BODY | {"guidance_interval": [100, 700]},
        headers={"Origin": ORIGIN, "Accept": "image/png"},
    )
    assert answer.headers["access-control-allow-origin"] == "*"
    exposed = {name.lower() for name in answer.headers["access-control-expose-headers"].split(", ")}
    facts = {name for name in answer.headers if name.startswith("x-lamamba-")}
    assert facts == {f"x-lamamba-{name.lower()}" for name in FACT_HEADERS}
    assert facts | {"x-request-id", "server-timing", "retry-after", "idempotent-replayed"} == exposed


@pytest.mark.parametrize("left_in", [False, True], ids=["proxy-strips", "proxy-leaves"])
def test_behind_a_proxy_everything_is_under_the_root_path(client_of: ClientFactory, left_in: bool) -> None:
    client = client_of(root_path="/images")
    prefix = "/images" if left_in else ""
    assert client.post(f"{prefix}/generate", json=BODY).status_code == 200
    openai = client.post(f"{prefix}/v1/images/generations", json={"prompt": ""})
    assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get(f"{prefix}/health/ready").status_code == 200
    assert "url: '/images/openapi.json'" in client.get(f"{prefix}/docs").text
    assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/images"}]
