"""`lamamba bench batching`: if this fails, one way to batch is said to be faster than another, and is not.

The servers and the clock are fakes: each answers at a rate and after a time that the test sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

import service.benchmark.plot
import service.benchmark.run
from service.benchmark.arrivals import PlannedRequest
from service.benchmark.load import Outcome
from service.benchmark.plot import plot_comparison
from service.benchmark.server import RunningServer, ServerNotStarted
from service.benchmark.summary import compare
from service.cli import app

MIX = "- {steps: 10}\n- {steps: 40}"


@dataclass
class FakeServers:
    """Servers by the last word of their commands."""

    rates: dict[str, float]
    """Images a second when saturated."""
    latencies: dict[str, float]
    """Seconds of a request of 10 steps; in proportion for others."""
    broken_after: int = 1000
    """Starts until the first that fails."""
    started: list[list[str]] = field(default_factory=list)
    running: int = 0
    arrivals: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    """By server and rate of the plan."""

    @contextmanager
    def running_command(self, command: Sequence[str]) -> Iterator[RunningServer]:
        if len(self.started) == self.broken_after:
            raise ServerNotStarted("the server ended with 1 before it was ready: no more memory")
        self.started.append(list(command))
        assert self.running == 0, "each server is to be alone on the machine"
        self.running += 1
        yield RunningServer(url=command[-1], process=cast(Any, None), live_s=0.0, ready_s=0.0)
        self.running -= 1

    async def closed_loop(
        self, url: str, planned: Sequence[PlannedRequest], *, concurrency: int, **options: Any
    ) -> list[Outcome]:
        return [
            Outcome(entry=request.entry, at_s=0.0, sent_s=0.0, done_s=(i + 1) / self.rates[url], status="200")
            for i, request in enumerate(planned)
        ]

    async def open_loop(self, url: str, planned: Sequence[PlannedRequest], **options: Any) -> list[Outcome]:
        self.arrivals[url, round(len(planned) / planned[-1].at_s, 2)] = [request.at_s for request in planned]
        return [
            Outcome(
                entry=request.entry,
                at_s=request.at_s,
                sent_s=request.at_s,
                done_s=request.at_s + self.latencies[url] * request.entry.steps / 10,
                status="200",
            )
            for request in planned
        ]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> FakeServers:
    fakes = FakeServers(
        rates={"continuous": 4.0, "static": 2.0, "peer": 1.0},
        latencies={"continuous": 1.0, "static": 3.0, "peer": 6.0},
    )
    for name in ("running_command", "closed_loop", "open_loop"):
        monkeypatch.setattr(service.benchmark.run, name, getattr(fakes, name))
    monkeypatch.setattr(service.benchmark.run, "check_server", lambda url, mix: None)
    monkeypatch.setattr("model.benchmark.plot.can_plot", lambda: False)
    return fakes


def bench_batching(folder: Path, *arguments: str) -> tuple[int, str]:
    mix = folder / "mix.yaml"
    mix.write_text(MIX)
    common = ("--mix", str(mix), "--output-dir", str(folder), "--requests", "80", "--concurrency", "4")
    result = CliRunner().invoke(
        app, ["bench", "batching", *common, *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def results(folder: Path) -> Any:
    return json.loads((folder / "batching.json").read_text())


def test_all_servers_meet_the_same_load_at_shares_of_the_references_capacity(
    servers: FakeServers, tmp_path: Path
) -> None:
    code, output = bench_batching(
        tmp_path, "--shares", "0.5,0.9", "--peer", "other=run peer", "--", "--max-rows", "16"
    )
    assert code == 0, output
    content = results(tmp_path)
    names = ("continuous", "static", "other")
    assert [(run["policy"], run["share"]) for run in content["runs"]] == [
        (name, share) for share in (None, 0.5, 0.9) for name in names
    ]
    saturated, half, most = (content["runs"][start : start + 3] for start in (0, 3, 6))
    assert [run["saturated_images_per_s"] for run in saturated] == [4.0, 2.0, 1.0]
    assert {run["offered_images_per_s"] for run in half} == {1.0}
    assert {run["offered_images_per_s"] for run in most} == {1.8}
    by_rate = {
        rate: [times for (_, at), times in servers.arrivals.items() if at == rate]
        for _, rate in servers.arrivals
    }
    assert len(by_rate) == 2
    assert all(len(plans) == 3 and plans[0] == plans[1] == plans[2] for plans in by_rate.values())
    assert all("--max-rows" in command for command in servers.started if command[-1] != "peer")
    assert servers.started[2] == ["run", "peer"]
    assert content["config"]["servers"]["other"] == "run peer"


def test_figures_are_over_the_references(servers: FakeServers, tmp_path: Path) -> None:
    code, output = bench_batching(tmp_path, "--shares", "0.5")
    assert code == 0, output
    assert "continuous / static, saturated: throughput 2.00x" in output
    assert "continuous / static, 50%: p95 of all requests 0.33x, 10-steps 0.33x, 40-steps 0.33x" in output
    saturated, half = results(tmp_path)["comparison"]
    assert saturated == {"policy": "continuous", "over": "static", "share": None, "throughput": 2.0}
    assert half["p95_by_entry"] == {"10-steps": 0.3333, "40-steps": 0.3333}


def test_the_reference_is_compared_with_the_best_limits_of_a_sweep(
    servers: FakeServers, tmp_path: Path
) -> None:
    """The one of the lowest p95 at 70% of the largest capacity, though it is not the one of that capacity."""
    servers.rates |= {"20": 2.0, "50": 5.0, "200": 3.0}
    servers.latencies |= {"20": 4.0, "50": 2.0, "200": 1.5}
    code, output = bench_batching(tmp_path, "--shares", "0.5", "--sweep", "2:20,4:50,8:200")
    assert code == 0, output
    assert "static is measured with 8:200" in output
    content = results(tmp_path)
    swept = content["sweep"]
    assert (swept["share"], swept["best"]) == (0.7, "8:200")
    assert [(run["policy"], run["share"]) for run in swept["runs"]] == [
        (label, share) for share in (None, 0.7) for label in ("2:20", "4:50", "8:200")
    ]
    assert {run["offered_images_per_s"] for run in swept["runs"][3:]} == {3.5}
    assert [run["policy"] for run in content["runs"]] == ["continuous", "static"] * 2
    assert servers.started[-1][-4:] == ["--batch-size", "8", "--batch-wait-ms", "200"]
    assert content["runs"][1]["saturated_images_per_s"] == 3.0
    assert "--batch-size 8 --batch-wait-ms 200" in content["config"]["servers"]["static"]


def test_a_server_that_does_not_start_leaves_the_runs_before_it(servers: FakeServers, tmp_path: Path) -> None:
    servers.broken_after = 3
    code, output = bench_batching(tmp_path)
    assert code == 1, output
    assert output.splitlines()[-1] == "lamamba: the server ended with 1 before it was ready: no more memory"
    assert [run["policy"] for run in results(tmp_path)["runs"]] == ["continuous", "static", "continuous"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--reference", "none"], "reference: none given; one of continuous, static", id="reference"
        ),
        pytest.param(["--sweep", "4:20,8"], "sweep: 4:20,8 given; N:W with commas between", id="sweep"),
        pytest.param(["--sweep", "0:20"], "sweep: 0:20 given", id="sweep-of-none"),
        pytest.param(["--shares", "0.5,much"], "shares: 0.5,much given", id="shares"),
        pytest.param(
            ["--concurrency", "11"], "requests: 80 given with a concurrency of 11; 88", id="concurrency"
        ),
        pytest.param(["--policy", "static"], "policy: static given; NAME=WORDS", id="policy"),
        pytest.param(["--policy", "a='b"], "policy: a='b given; no closing quotation", id="quotation"),
        pytest.param(["--peer", "litserve="], "peer: litserve= given; NAME=COMMAND", id="no-command"),
        pytest.param(["--peer", "static=run"], "peer: static given 2 times; names must differ", id="names"),
    ],
)
def test_bad_input_is_refused_before_a_server_starts(
    servers: FakeServers, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, output = bench_batching(tmp_path, *arguments)
    assert (code, output.count("\n")) == (2, 1), output
    assert message in output
    assert servers.started == []


def run_of(policy: str, share: float | None, p95: float | None, *, rate: float = 1.0) -> dict[str, Any]:
    figures = {"latency_s": None if p95 is None else {"p50": p95 / 2, "p95": p95}}
    run = {"policy": policy, "share": share, "overall": figures, "by_entry": {"10-steps": figures}}
    if share is None:
        return run | {"loop": "closed", "saturated_images_per_s": rate}
    return run | {"loop": "open", "offered_images_per_s": rate * share}


def test_compare_leaves_out_what_the_reference_has_not_run() -> None:
    runs = [run_of("new", 0.5, 1.0), run_of("old", 0.5, 4.0), run_of("new", 0.9, 1.0)]
    (row,) = compare(runs, "old")
    assert row == {
        "policy": "new",
        "over": "old",
        "share": 0.5,
        "p95": 0.25,
        "p95_by_entry": {"10-steps": 0.25},
    }


@pytest.mark.parametrize(("new", "old"), [(None, 4.0), (1.0, None)], ids=["new", "reference"])
def test_compare_has_no_ratio_where_nothing_was_answered(new: float | None, old: float | None) -> None:
    (row,) = compare([run_of("new", 0.5, new), run_of("old", 0.5, old)], "old")
    assert (row["p95"], row["p95_by_entry"]) == (None, {"10-steps": None})


COMPARED = {
    "environment": {"cpus": 2, "cpu": "a CPU"},
    "runs": [
        *(run_of(policy, None, 1.0, rate=rate) for policy, rate in (("new", 4.0), ("old", 2.0))),
        *(run_of(policy, share, 1.0, rate=2.0) for share in (0.5, 0.9) for policy in ("new", "old")),
    ],
}


def test_the_plot_tells_policies_and_percentiles_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    panels = (MagicMock(), MagicMock())
    for panel in panels:
        panel.get_legend_handles_labels.return_value = ([1], ["a"])
    pyplot = MagicMock()
    pyplot.subplots.return_value = (MagicMock(), panels)
    monkeypatch.setattr(service.benchmark.plot, "pyplot", lambda: pyplot)
    plot_comparison(COMPARED, tmp_path / "batching.png")
    for panel in panels:
        lines = {call.kwargs["label"]: call for call in panel.plot.call_args_list}
        assert set(lines) == {"new, p95", "new, p50", "old, p95", "old, p50"}
        assert lines["new, p95"].args[:2] == ((1.0, 1.8), (1.0, 1.0))
        assert lines["new, p50"].args[:2] == ((1.0, 1.8), (0.5, 0.5))
        marks = {(call.kwargs["color"], call.kwargs["marker"]) for call in lines.values()}
        assert len(marks) == 4
        assert [call.args[0] for call in panel.axvline.call_args_list] == [4.0, 2.0]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = plot_comparison(COMPARED, tmp_path / "batching.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
