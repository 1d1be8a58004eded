"""benchmarks/soak.py: if these fail, lost, doubled or swapped answers could pass for right ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.concurrent_requests import alone, expected_metadata
from benchmarks.soak import (
    Ending,
    SoakRequest,
    faults_of,
    logged_answers,
    main,
    plan,
    server_faults,
    wrong_images,
)
from model.images import encode_image
from tests.fakes import LABELS, fake_pipeline
from tests.tiny_model import save_tiny_model


def ending(kind: str = "image", status: int = 200, *, index: int = 0, expected: int = 200) -> Ending:
    """A request that was answered at its first try, or left by its client at status 0."""
    request = SoakRequest(index=index, kind=kind, body=b"", expected=expected)
    name = f"soak-{index}-0"
    return Ending(
        request=request, tried=[name], status=status, answered_id=name if status else "", left=not status
    )


def test_a_plan_holds_every_kind_in_its_share_and_repeats() -> None:
    requests = plan(5000, 21)
    assert requests == plan(5000, 21)
    shares = {kind: n / 5000 for kind, n in Counter(request.kind for request in requests).items()}
    assert shares == pytest.approx({"image": 0.8, "leaves": 0.1, "late": 0.05, "invalid": 0.05}, abs=0.015)
    assert {request.image["steps"] for request in requests if request.kind == "image"} == set(range(2, 13))


def test_answers_as_they_must_be_are_no_faults() -> None:
    endings = [
        ending(index=0),
        ending("late", 504, index=1, expected=504),
        ending("leaves", 0, index=2),
        ending("leaves", 0, index=3),
    ]
    logged = [("soak-0-0", 200), ("soak-1-0", 504), ("soak-2-0", 499), ("soak-3-0", 200), ("soak-9-0", 503)]
    assert faults_of(endings, logged) == []


@pytest.mark.parametrize(
    ("endings", "logged", "fault"),
    [
        ([ending(status=500)], [("soak-0-0", 500)], "image 0: 500, not 200"),
        ([ending()], [("soak-0-0", 200), ("soak-0-0", 200)], "soak-0-0: 2 answers in the log"),
        ([ending()], [], "soak-0-0: received and not in the log"),
        ([ending()], [("soak-0-0", 200), ("soak-7-0", 200)], "soak-7-0: 200 in the log was not received"),
    ],
    ids=["failed", "twice", "unlogged", "lost"],
)
def test_faults_are_found(endings: list[Ending], logged: list[tuple[str, int]], fault: str) -> None:
    assert faults_of(endings, logged) == [fault]


def test_the_log_is_read_past_what_is_no_record() -> None:
    lines = [
        json.dumps({"logger": "service.access", "path": "/generate", "request_id": "a", "status": 200}),
        "a warning of Python's",
        json.dumps({"logger": "service.access", "path": "/metrics", "request_id": "b", "status": 200}),
        json.dumps({"logger": "service.runtime", "request_id": "-", "message": "ready"}),
    ]
    assert logged_answers("\n".join(lines).encode()) == [("a", 200)]


def test_another_requests_image_is_found() -> None:
    pipeline = fake_pipeline()
    endings = []
    for request in plan(40, len(LABELS)):
        if request.kind == "image":
            pixels = alone(pipeline, request.image, 0)
            file = encode_image(pixels, "png", 90, expected_metadata(pipeline, request.image, 0))
            endings.append(Ending(request=request, tried=["a"], status=200, file=file))
    assert wrong_images(pipeline, endings) == (0, [])
    first = next(e for e in endings[1:] if e.request.image != endings[0].request.image)
    endings[0].file = first.file
    assert len(wrong_images(pipeline, endings)[1]) == 1


LIFE = {
    "exit_code": 0,
    "settled_rss_bytes": 100,
    "rss_bytes": 109,
    "in_use_at_the_end": {"active_slots": 0.0},
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"exit_code": None}, "ended with None"),
        ({"rss_bytes": 111}, "memory"),
        ({"in_use_at_the_end": {"active_slots": 1.0}}, "in use at the end"),
    ],
    ids=["sound", "killed", "grows", "leaks"],
)
def test_a_servers_end_is_judged(change: dict[str, Any], fault: str | None) -> None:
    faults = server_faults([LIFE | change])
    assert (fault is None and not faults) or (fault is not None and fault in faults[0])


def test_a_hundred_requests_with_faults_and_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path)
    main(["--model", str(folder), "--requests", "100", "--restarts", "1", "--output-dir", str(tmp_path)])
    results = json.loads((tmp_path / "soak-cpu.json").read_text())["results"]
    assert results["faults"] == []
    assert [life["exit_code"] for life in results["servers"]] == [0, 0]
    assert sum(results["requests"].values()) == 100
