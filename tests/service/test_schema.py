"""The server against its OpenAPI schema: if this fails, generated clients meet answers that nobody announced.

schemathesis makes requests that the schema allows, and ones that it does not; each answer has to be no
internal error, of a documented status and media type, and of the documented shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.api_keys import key_hash, new_key
from service.app import create_app
from service.settings import Settings
from tests.fakes import fake_pipeline

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the dev extra")

OPERATIONS = [
    ("POST", "/generate"),
    ("POST", "/v1/images/generations"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/v1/classes"),
    ("GET", "/health/startup"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/admin/models"),
    ("POST", "/admin/models/{name}/load"),
    ("POST", "/admin/models/{name}/unload"),
]
ADMIN_KEY = new_key()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[TestClient, Any]]:
    """A client of a server, and its schema."""
    pipelines = (fake_pipeline(), fake_pipeline("fake-32", resolution=32))
    app = create_app(Settings(default_timeout_s=0.2, admin_key=f"root:{key_hash(ADMIN_KEY)}"), pipelines)
    with TestClient(app) as client:
        yield client, schemathesis.openapi.from_dict(client.get("/openapi.json").json())


def ask_as_documented(served: tuple[TestClient, Any], method: str, path: str, *, num_cases: int) -> None:
    client, schema = served
    operation = schema[path][method]
    checks = schemathesis.checks
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        request = case.as_transport_kwargs(base_url=str(client.base_url))
        if path.startswith("/admin/"):  # with a made-up key every answer would be 401
            request["headers"] = dict(request["headers"]) | {"Authorization": f"Bearer {ADMIN_KEY}"}
        response = client.request(**request)
        assert response.status_code != 500, (
            response.text
        )  # a 504 is an answer too: long requests are given up
        case.validate_response(
            response,
            checks=[
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    ask()


def test_all_operations_are_asked(served: tuple[TestClient, Any]) -> None:
    documented = {
        (method.upper(), path)
        for path, methods in served[1].raw_schema["paths"].items()
        for method in methods
    }
    assert documented == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_documented(served: tuple[TestClient, Any], method: str, path: str) -> None:
    ask_as_documented(served, method, path, num_cases=15 if method == "POST" else 5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_of_many_is_documented(served: tuple[TestClient, Any], method: str, path: str) -> None:
    ask_as_documented(served, method, path, num_cases=900 if method == "POST" else 200)
