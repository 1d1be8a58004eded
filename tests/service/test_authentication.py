"""API keys: if this fails, strangers use the server, or its keys leak into logs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from service.api.authentication import Client
from service.api.deps import GivenContext
from service.api_keys import KeyRing, key_hash, new_key, parse_key_hashes
from service.app import create_app
from service.cli import app as command
from service.errors import StartupError
from service.logs import configure_logging
from service.settings import Settings, load_settings
from tests.fakes import fake_pipeline
from tests.service.conftest import ClientFactory

KEY, OTHER = new_key(), new_key()
SETTINGS: dict[str, Any] = {"api_keys": f"alice:{key_hash(KEY)}, bob:{key_hash(OTHER)}"}
BODY: dict[str, Any] = {"class_id": 2, "steps": 1, "seed": 9}
OPENAI_BODY: dict[str, Any] = {"prompt": "forest", "steps": 1}


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Authorization": f"Bearer {KEY}"}, id="bearer"),
        pytest.param({"Authorization": f"bearer  {OTHER} "}, id="scheme-in-any-case"),
        pytest.param({"X-API-Key": KEY}, id="x-api-key"),
    ],
)
def test_a_known_key_is_served(client_of: ClientFactory, headers: dict[str, str]) -> None:
    client = client_of(**SETTINGS)
    assert client.post("/generate", json=BODY, headers=headers).status_code == 200
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        pytest.param({}, 'Bearer realm="lamamba"', id="none"),
        pytest.param({"Authorization": "Bearer "}, 'Bearer realm="lamamba"', id="empty"),
        pytest.param({"Authorization": f"Basic {KEY}"}, 'Bearer realm="lamamba"', id="another-scheme"),
        pytest.param(
            {"Authorization": f"Bearer {KEY}x"}, 'Bearer realm="lamamba", error="invalid_token"', id="wrong"
        ),
        pytest.param(
            {"X-API-Key": key_hash(KEY)}, 'Bearer realm="lamamba", error="invalid_token"', id="the-hash"
        ),
        pytest.param({"X-API-Key": "\xfc"}, 'Bearer realm="lamamba", error="invalid_token"', id="not-ascii"),
    ],
)
def test_without_a_known_key_every_route_answers_401(
    client_of: ClientFactory, headers: dict[str, str], challenge: str
) -> None:
    client = client_of(**SETTINGS)
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("POST", "/generate"), ("GET", "/v1/classes"), ("GET", "/nowhere")):
        answer = client.request(method, path, headers=raw, content=b"{")
        assert answer.status_code == 401, answer.text
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == challenge
        assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"]
        assert KEY not in answer.text
    answer = client.post("/v1/images/generations", json=OPENAI_BODY, headers=raw)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert 'lamamba_rejections_total{code="invalid_api_key"} 4.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/version", "/metrics", "/health/live", "/health/startup"]
)
def test_probes_metrics_and_documents_need_no_key(client_of: ClientFactory, path: str) -> None:
    assert client_of(**SETTINGS).get(path).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/docsx", "/proxy/version/x", "/proxyversion"])
def test_a_path_that_looks_like_an_open_one_needs_a_key(client_of: ClientFactory, path: str) -> None:
    assert client_of(**SETTINGS, root_path="/proxy").get(path).status_code == 401


def test_the_schema_has_the_key_where_there_are_keys(client_of: ClientFactory) -> None:
    with_keys = client_of(**SETTINGS).get("/openapi.json").json()
    assert set(with_keys["components"]["securitySchemes"]) == {"HTTPBearer", "APIKeyHeader"}
    for path, operations in with_keys["paths"].items():
        protected = path in ("/generate", "/v1/images/generations") or path.startswith("/v1/")
        for operation in operations.values():
            assert ("security" in operation) is ("401" in operation["responses"]) is protected, path
    assert "securitySchemes" not in client_of().get("/openapi.json").json()["components"]


@pytest.mark.usefixtures("_root_logger")
def test_logs_and_metrics_have_the_name_and_never_the_key() -> None:
    stream = io.StringIO()
    configure_logging("debug", as_json=True, stream=stream)
    app = create_app(Settings(**SETTINGS), (fake_pipeline(),))
    with TestClient(app) as client:
        client.post("/generate", json=BODY, headers={"Authorization": f"Bearer {KEY}"})
        client.post("/generate", json=BODY, headers={"X-API-Key": "mistyped-" + OTHER})
        metrics = client.get("/metrics").text
    for text in (stream.getvalue(), metrics, repr(app.state.runtime.settings)):
        assert KEY not in text
        assert OTHER not in text
        assert key_hash(KEY) not in text
    assert '"api_key": "alice"' in stream.getvalue()
    assert 'lamamba_api_key_requests_total{name="alice"} 1.0' in metrics


def test_keys_come_from_a_file_too(client_of: ClientFactory, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# clients\n\ncarol:{key_hash(KEY).upper()}  # the page\n")
    client = client_of(api_keys_file=file)
    assert client.get("/v1/models", headers={"X-API-Key": KEY}).status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_a_key_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(StartupError, match="not readable"):
        create_app(Settings(api_keys_file=file))
    file.write_text(f"alice:{KEY}")
    with pytest.raises(StartupError, match="entry 1: a SHA-256") as refusal:
        create_app(Settings(api_keys_file=file))
    assert KEY not in str(refusal.value)
    file.write_text(f"alice:{key_hash(OTHER)}")
    with pytest.raises(StartupError, match="the name alice is in LAMAMBA_API_KEYS too"):
        create_app(Settings(**SETTINGS, api_keys_file=file))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param(KEY, "entry 1: name:hash is accepted", id="a-key"),
        pytest.param(f"alice:{KEY}", "a SHA-256 in 64 hexadecimal digits is accepted", id="a-named-key"),
        pytest.param(f"a b:{key_hash(KEY)}", "entry 1: name:hash is accepted", id="name"),
        pytest.param(f"a:{key_hash(KEY)},a:{key_hash(OTHER)}", "the name a is given twice", id="twice"),
    ],
)
def test_a_wrong_setting_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    monkeypatch.setenv("LAMAMBA_API_KEYS", value)
    with pytest.raises(StartupError, match=reason) as refusal:
        load_settings()
    assert str(refusal.value).startswith("LAMAMBA_API_KEYS: a value that is not shown given; ")
    assert KEY not in str(refusal.value)
    assert refusal.value.__suppress_context__


def test_api_key_command_prints_a_key_and_the_line_that_accepts_it() -> None:
    result = CliRunner().invoke(command, ["api-key", "alice"])
    assert result.exit_code == 0
    key, entry = (line.split()[1] for line in result.output.splitlines())
    assert KeyRing(parse_key_hashes([entry])).name_of(key) == "alice"
    assert CliRunner().invoke(command, ["api-key", "a:b"]).exit_code == 2


@pytest.mark.parametrize(
    ("host", "address"),
    [
        pytest.param("192.0.2.7", "192.0.2.7", id="ipv4"),
        pytest.param("::ffff:192.0.2.7", "192.0.2.7", id="ipv4-of-a-socket-for-both"),
        pytest.param("2001:db8::1:2:3:4", "2001:db8::/64", id="ipv6"),
        pytest.param("a-name", "a-name", id="name"),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(host: str, address: str) -> None:
    app = create_app(Settings(), (fake_pipeline(),))
    named: list[str] = []

    @app.get("/who")
    def who(context: GivenContext) -> None:
        named.append(context.client)

    with TestClient(app, client=(host, 1)) as client:
        assert client.get("/who").status_code == 200
    assert named == [f"address:{address}"]


def test_a_client_without_a_key_goes_by_address_and_no_name_passes_for_one() -> None:
    assert Client(key_name=None, address="x").identity != Client(key_name="x", address="x").identity
