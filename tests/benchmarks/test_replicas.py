"""benchmarks/replicas.py: if these fail, a lost answer could pass for a delivered one, and another
configuration of the balancer for the documented one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replicas import (
    TEMPLATE,
    Feed,
    Route,
    compared,
    configuration,
    end_figures,
    faults_of,
    main,
    routes,
    simulate_again,
    simulated,
    spread,
)
from benchmarks.scale_sim import StepTimes
from service.benchmark.arrivals import PlannedRequest
from service.benchmark.load import Outcome
from service.benchmark.mix import MixEntry
from tests.tiny_model import save_tiny_model

ENTRY = MixEntry(steps=4)


def haproxy() -> str:
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("haproxy is not installed")
    return program


def outcome(*ids: str, status: str = "200", sent_s: float = 0.0, done_s: float = 1.0) -> Outcome:
    return Outcome(
        entry=ENTRY, at_s=sent_s, sent_s=sent_s, done_s=done_s, status=status, request_ids=tuple(ids)
    )


def test_each_replica_has_cores_of_its_own_where_there_are_enough() -> None:
    assert spread(range(16), 4, 2) == ([[0, 1], [2, 3], [4, 5], [6, 7]], list(range(8, 16)))
    assert spread([4, 5], 2, 1) == ([[4, 5], [4, 5]], [4, 5])


def test_the_configuration_is_the_documented_one_with_other_servers() -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    text = configuration(template, 9000, {"one": "127.0.0.1:9001"})
    changed = set(text.splitlines()) ^ set(template.splitlines())
    assert changed == {
        "    bind :8000",
        "    bind 127.0.0.1:9000",
        "    server lamamba-1 127.0.0.1:8001",
        "    server lamamba-2 127.0.0.1:8002",
        "    server one 127.0.0.1:9001",
    }
    with pytest.raises(ValueError, match="one `bind`"):
        configuration("frontend a\n", 9000, {})


def test_haproxy_accepts_the_documented_configuration(tmp_path: Path) -> None:
    command = [haproxy(), "-c", "-f"]
    assert subprocess.run([*command, str(TEMPLATE)], capture_output=True, check=False).returncode == 0
    planted = tmp_path / "haproxy.cfg"
    planted.write_text(TEMPLATE.read_text(encoding="utf-8").replace("retry-on conn-failure", "retry-on 429s"))
    assert subprocess.run([*command, str(planted)], capture_output=True, check=False).returncode == 1


def test_the_log_is_read_past_what_is_no_request() -> None:
    log = (
        "[WARNING] (1) : Server servers/lamamba-1 is DOWN, reason: Layer7 wrong status, code: 503\n"
        "0123456789abcdef lamamba-2 200 -- 0 1532\n"
        "- lamamba-1 200 -- 0 3\n"
        "fedcba9876543210 lamamba-1 502 SH 0 +12\n"
        "fedcba987654321f <NOSRV> 503 SC 3 2\n"
    )
    assert routes(log) == [
        Route("0123456789abcdef", "lamamba-2", 200),
        Route("fedcba9876543210", "lamamba-1", 502),
        Route("fedcba987654321f", "<NOSRV>", 503),
    ]


SOUND = [outcome("a"), outcome("b", "c")]
TAKEN = [Route("a", "one", 200), Route("b", "two", 502), Route("c", "three", 200)]
ANSWERED = {"one": ["a"], "two": [], "three": ["c"]}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"outcomes": [*SOUND, outcome("d", status="ReadError")]}, "ReadError after 1 tries"),
        ({"exit_code": -15}, "one: ended with -15"),
        ({"answered": ANSWERED | {"three": ["c", "a"]}}, "a: answered 2 times"),
        ({"answered": ANSWERED | {"one": ["a", "x"]}}, "x: one answered it, and nobody received that"),
        ({"answered": ANSWERED | {"three": []}}, "c: received, and in no replica's log"),
        ({"taken": [*TAKEN, Route("b", "one", 502)]}, "b: one had it, and it ended with 502"),
    ],
    ids=["sound", "failed", "killed", "twice", "lost", "unlogged", "broken"],
)
def test_faults_are_found(change: dict[str, Any], fault: str | None) -> None:
    case: dict[str, Any] = {"outcomes": SOUND, "taken": TAKEN, "answered": ANSWERED, "exit_code": 0} | change
    faults = faults_of(terminated="one", **case)
    assert (fault is None and not faults) or (fault is not None and any(fault in one for one in faults))


def test_ends_count_what_was_open_and_what_was_made_again() -> None:
    outcomes = [
        outcome("a", sent_s=1.0, done_s=3.0),
        outcome("b", sent_s=2.5, done_s=4.0),
        outcome("c", "d", sent_s=3.0, done_s=9.0),
    ]
    taken = [
        Route("a", "one", 200),
        Route("b", "three", 200),
        Route("c", "two", 502),
        Route("d", "three", 200),
    ]
    answered = {"one": ["a"], "two": ["c"], "three": ["b", "d"]}
    figures = end_figures(outcomes, taken, answered, {"one": 2.0, "two": 5.0})
    assert figures == {
        "planned": 3,
        "answered": 3,
        "tried_again": 1,
        "made_more_than_once": 1,
        "answered_after_sigterm": 1,
        "tries_by_status": {"200": 3, "502": 1},
        "by_server": {"one": 1, "three": 2},
    }


def test_the_simulation_gets_the_same_arrivals() -> None:
    planned = [PlannedRequest(at_s=at_s, entry=ENTRY, body={}) for at_s in (0.0, 10.0)]
    latencies = simulated(planned, replicas=1, feed=Feed(StepTimes((2,), (0.5,)), 0.25))
    assert latencies == pytest.approx([2.25, 2.25])
    assert compared({"p95": 2.5}, {"p95": 2.25})["error"] == {"p95": -0.1}


def test_the_simulation_is_fed_with_the_means_of_before_and_after() -> None:
    before, after = Feed(StepTimes((2, 4), (0.5, 0.75)), 0.25), Feed(StepTimes((2, 4), (0.25, 0.75)), 0.5)
    mean = before.mean_with(after)
    assert mean.to_dict() == {"step_ms": {"2": 375.0, "4": 750.0}, "after_ms": 375.0}
    assert Feed.from_dict(mean.to_dict()) == mean


def test_the_loads_of_a_file_are_simulated_again() -> None:
    feed = {"step_ms": {"2": 10.0, "4": 10.0, "6": 10.0, "8": 10.0}, "after_ms": 50.0}
    row = {"replicas": 1, "offered_images_per_s": 0.5, "before": feed, "after": feed}
    row["run"] = {"overall": {"latency_s": {"p50": 0.1, "p95": 0.08}}}
    results = {"mix": [ENTRY.model_dump()], "latency": [row]}
    results["arrivals"] = {"requests": 5, "phase_s": 100.0, "seed": 0}
    simulate_again(results)
    assert row["simulated_s"]["p50"] == pytest.approx(0.09)  # its 4 steps and what comes after them
    assert row["error"]["p50"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "1,2"], "the largest 3 or more"),
        (["--share", "1.5"], "share"),
        (["--rounds", "2"], "rounds: 2 given"),
        (["--load-balancer", "/nowhere/haproxy"], "load-balancer: /nowhere/haproxy given"),
    ],
)
def test_a_wrong_option_is_said(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_three_replicas_of_which_two_end(tmp_path: Path) -> None:
    haproxy()
    folder = save_tiny_model(tmp_path)
    mix = tmp_path / "mix.yaml"
    mix.write_text("- {steps: 24}\n- {steps: 48}\n")  # long enough to be seen when it begins
    options = ["--model", str(folder), "--mix", str(mix), "--replicas", "3", "--requests", "40"]
    main([*options, "--share", "0.4", "--output-dir", str(tmp_path)])
    results = json.loads((tmp_path / "replicas.json").read_text())["results"]
    assert results["faults"] == []
    assert results["ends"]["answered"] == results["ends"]["planned"] > 5
    assert results["ends"]["exit_code_after_sigterm"] == 0
    assert set(results["latency"][0]["error"]) == {"p50", "p95", "p99", "mean"}
