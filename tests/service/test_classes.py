"""GET /v1/classes and /v1/models/{id}: if this fails, people cannot find out what to ask for."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.classes import find_classes
from tests.fakes import LABELS, fake_pipeline
from tests.service.conftest import ClientFactory


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", [0, 1, 2, 3, 4]),
        (" Venice ", [2]),
        ("E", [0, 1, 2, 4]),  # anywhere within, ascending
        ("ga", [4]),
        ("k", [1]),
        ("2", [2]),
        ("vence squre", [2]),
        ("gardn", [4]),
        ("xyzzy", []),
        ("\ud800", []),
    ],
)
def test_classes_are_found_by_part_or_likeness(client: TestClient, text: str, found: list[int]) -> None:
    assert find_classes(LABELS, text) == found
    if text != "\ud800":  # which a URL cannot hold
        answer = client.get("/v1/classes", params={"q": text})
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "object": "list",
            "model": "fake-16",
            "resolution": 16,
            "total": len(found),
            "data": [{"class_id": index, "label": LABELS[index]} for index in found],
        }


def test_the_best_match_is_first_and_equal_labels_are_all_found() -> None:
    labels = ["cranes", "red crane", "crane", "crate", "crane", *["x"] * 8]
    assert find_classes(labels, "crane") == [2, 4, 0, 1, 3]
    assert find_classes(labels, "cranne") == [2, 4, 0, 3, 1]
    assert find_classes(labels, "1") == [1, 10, 11, 12]


def test_classes_are_the_picked_models_up_to_the_limit(client: TestClient) -> None:
    answer = client.get("/v1/classes", params={"limit": 2, "resolution": 32}).json()
    assert (answer["model"], answer["total"], len(answer["data"])) == ("fake-32", 5, 2)
    assert client.get("/v1/classes", params={"model": "fake-32"}).json()["resolution"] == 32


def test_a_model_without_classes_has_none(client_of: ClientFactory) -> None:
    answer = client_of(fake_pipeline("plain", num_classes=0)).get("/v1/classes", params={"q": "forest"})
    assert (answer.status_code, answer.json()["data"]) == (200, [])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"limit": 0}, 'limit: "0" given; this model accepts 1 to 1000'),
        ({"limit": 1001}, 'limit: "1001" given; this model accepts 1 to 1000'),
        ({"limit": "many"}, 'limit: "many" given; this model accepts an integer, 1 to 1000'),
        ({"resolution": "x"}, 'resolution: "x" given; this model accepts an integer, 16 or 32'),
        ({"resolution": 64}, "resolution: 64 given; this server accepts 16 or 32"),
        ({"model": "other"}, 'model: "other" given; this server accepts fake-16 or fake-32'),
        ({"model": "fake-16", "resolution": 32}, "resolution: 32 given; this model accepts 16"),
        ({"query": "a"}, 'query: "a" given; this request accepts q, model, resolution, limit'),
        ({"q": "a" * 201}, "this model accepts text of up to 200 characters"),
    ],
)
def test_a_bad_query_is_named(client: TestClient, query: dict[str, Any], message: str) -> None:
    answer = client.get("/v1/classes", params=query)
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["error"]["message"]


def test_one_model_is_what_the_list_has(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [model["max_rows"] for model in listed] == [8] * len(listed)
    assert [client.get(f"/v1/models/{model['id']}").json() for model in listed] == listed
    answer = client.get("/v1/models/other")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert answer.json()["error"]["message"] == 'model: "other" given; this server has fake-16 or fake-32'


def test_the_schema_documents_what_is_answered(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/classes"]["get"]["responses"]) == {"200", "422", "503"}
    assert set(paths["/v1/models/{model_id}"]["get"]["responses"]) == {"200", "404", "422", "503"}
    assert {p["name"] for p in paths["/v1/classes"]["get"]["parameters"]} == {
        *("q", "model", "resolution", "limit")
    }
