"""service/errors.py: if this fails, programs cannot rely on codes and people do not learn what to change."""

from __future__ import annotations

import json

import pytest

import service.errors
from service.api.responses import error_response
from service.errors import InvalidField, QueueFull, ServiceError, shown


def tree(cls: type[ServiceError]) -> list[type[ServiceError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]


def test_every_error_has_its_own_code_and_stands_in_the_headers_tree() -> None:
    codes = [cls.code for cls in tree(ServiceError)]
    assert len(set(codes)) == len(codes)
    for cls in tree(ServiceError):
        line = next(line for line in service.errors.__doc__.splitlines() if cls.__name__ + " " in line)
        assert f"{cls.status} {cls.code}" in line


@pytest.mark.parametrize(
    ("value", "json_value"),
    [
        (5000, 5000),
        (1.5, 1.5),
        ("dog", "dog"),
        (None, None),
        (True, True),
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
        ([1, 2], "[1, 2]"),
        (10**30, "1" + "0" * 30),
        ("x" * 500, '"' + "x" * 79 + "..."),
        ("\ud800", "\ud800"),
    ],
)
def test_error_response_repeats_any_value_in_valid_json(value: object, json_value: object) -> None:
    response = error_response(InvalidField("steps", value, "1 to 1000"), "id-1")
    body = json.loads(response.body)["error"]
    assert body["value"] == json_value
    assert body["message"] == f"steps: {shown(value)} given; this model accepts 1 to 1000"
    assert (body["field"], body["accepted"], body["request_id"]) == ("steps", "1 to 1000", "id-1")


def test_error_response_tells_when_to_come_back() -> None:
    assert error_response(QueueFull("queue: full", retry_after_s=2.1), "r").headers["retry-after"] == "3"
