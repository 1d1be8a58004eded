"""service/benchmark: if this fails, published latencies are not what users would meet."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from service.app import create_app
from service.benchmark.arrivals import PlannedRequest, plan_requests
from service.benchmark.load import Outcome, open_loop
from service.benchmark.mix import DEFAULT_MIX, MixEntry, load_mix
from service.benchmark.server import ServerNotStarted, running_command
from service.benchmark.summary import percentiles, saturated_images_per_s, summarize
from service.cli import app
from service.settings import Settings
from tests.fakes import fake_pipeline
from tests.servers import serving

ENTRY = MixEntry(steps=2, resolution=16)
TIMEOUT_S = 30.0


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@contextmanager
def answering(answer: Callable[[str | None], int | None]) -> Iterator[str]:
    """A server that answers each POST with the status that `answer` makes of its request id; with None its
    connection ends without one.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = answer(self.headers["x-request-id"])
            if status is not None:
                self.send_response(status)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(TIMEOUT_S)


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A real server of a fake model."""
    with serving(create_app(Settings(), (fake_pipeline(),))) as url:
        yield url


def test_poisson_arrivals_have_the_rate_and_spread_of_a_poisson_process() -> None:
    planned = plan_requests(DEFAULT_MIX, rate_per_s=5.0, num_requests=20_000)
    gaps = np.diff([request.at_s for request in planned])
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


def test_bursts_come_at_once_and_keep_the_rate() -> None:
    planned = plan_requests(DEFAULT_MIX, rate_per_s=5.0, num_requests=20_000, burst=8)
    times = [request.at_s for request in planned]
    assert all(len(set(times[start : start + 8])) == 1 for start in range(0, 20_000, 8))
    assert len(planned) / times[-1] == pytest.approx(5.0, rel=0.06)


def test_a_seed_fixes_a_run_and_another_rate_only_scales_it() -> None:
    plan = plan_requests(DEFAULT_MIX, rate_per_s=1.0, num_requests=50, seed=3)
    assert plan == plan_requests(DEFAULT_MIX, rate_per_s=1.0, num_requests=50, seed=3)
    assert plan != plan_requests(DEFAULT_MIX, rate_per_s=1.0, num_requests=50, seed=4)
    faster = plan_requests(DEFAULT_MIX, rate_per_s=2.0, num_requests=50, seed=3)
    assert [request.body for request in faster] == [request.body for request in plan]
    assert [2 * request.at_s for request in faster] == pytest.approx([request.at_s for request in plan])


def test_kinds_come_by_weight_and_nothing_comes_too_late() -> None:
    mix = (MixEntry(steps=1, weight=3), MixEntry(steps=2, weight=1))
    planned = plan_requests(mix, rate_per_s=10.0, num_requests=20_000, max_seconds=500.0)
    assert planned[-1].at_s <= 500.0
    assert len(planned) < 6000
    assert np.mean([request.entry is mix[0] for request in planned]) == pytest.approx(0.75, abs=0.02)


def test_arrivals_do_not_wait_for_answers() -> None:
    """A server that answers nothing before it has everything: a generator that waits would never end."""
    everyone = threading.Barrier(20)

    def answer(request_id: str | None) -> int:
        everyone.wait(TIMEOUT_S)
        return 200

    with answering(answer) as url:
        planned = [PlannedRequest(at_s=0.005 * i, entry=ENTRY, body=ENTRY.body(i)) for i in range(20)]
        outcomes = asyncio.run(open_loop(url, planned, timeout_s=TIMEOUT_S))
    assert [outcome.status for outcome in outcomes] == ["200"] * 20
    assert max(outcome.sent_s for outcome in outcomes) <= min(outcome.done_s for outcome in outcomes)


@pytest.mark.parametrize(
    ("answers", "status", "tries"),
    [([503, 200], "200", 2), ([None, 502, 429, 200], "200", 4), ([500, 200], "500", 1), ([422], "422", 1)],
    ids=["refused", "broken", "failed", "wrong"],
)
def test_a_client_tries_again_what_may_be_sent_again(
    answers: list[int | None], status: str, tries: int
) -> None:
    seen: list[str | None] = []

    def answer(request_id: str | None) -> int | None:
        seen.append(request_id)
        return answers[len(seen) - 1]

    with answering(answer) as url:
        planned = [PlannedRequest(at_s=0.0, entry=ENTRY, body={})]
        [one] = asyncio.run(open_loop(url, planned, timeout_s=TIMEOUT_S, retry_s=0.01))
    assert (one.status, one.tries) == (status, tries)
    assert one.request_ids == tuple(seen)
    assert len(set(seen)) == tries


def outcome(latency_s: float, *, at_s: float = 0.0, status: str = "200", entry: MixEntry = ENTRY) -> Outcome:
    return Outcome(entry=entry, at_s=at_s, sent_s=at_s, done_s=at_s + latency_s, status=status)


def test_percentiles_are_linear_between_values() -> None:
    assert percentiles([float(value) for value in range(101)]) == {
        "p50": 50.0,
        "p95": 95.0,
        "p99": 99.0,
        "mean": 50.0,
    }
    assert percentiles([]) is None


def test_goodput_counts_answers_in_time_by_the_entrys_own_limit_first() -> None:
    strict = MixEntry(steps=5, slo_s=1.0)
    outcomes = [
        *(outcome(1.5), outcome(4.0), outcome(0.1, status="429")),
        *(outcome(0.5, entry=strict), outcome(1.5, entry=strict)),
    ]
    figures = summarize(outcomes, slo_s=2.0)
    assert figures["overall"]["images_per_s"] == 1.0
    assert figures["overall"]["goodput_images_per_s"] == 0.5
    assert figures["overall"]["slo_share"] == 0.4
    assert figures["overall"]["statuses"] == {"200": 4, "429": 1}
    assert figures["by_entry"]["5-steps"]["slo_share"] == 0.5
    assert summarize(outcomes[:1])["overall"]["goodput_images_per_s"] is None


def test_capacity_leaves_out_the_beginning_and_the_end() -> None:
    slow_ends = [*(outcome(10.0 + i) for i in range(2)), *(outcome(11.0 + 0.5 * i) for i in range(1, 13))]
    tail = [outcome(100.0), outcome(200.0)]
    assert saturated_images_per_s([*slow_ends, *tail], 2) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="requests: 15 answered with a concurrency of 2; 16 and more"):
        saturated_images_per_s([*slow_ends, *tail][:15], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("- steps: 0", "entry 1: steps: 0 given; Input should be greater", id="range"),
        pytest.param('- steps: 5\n- steps: "5"', 'entry 2: steps: "5" given', id="type"),
        pytest.param("- weight: 1", "entry 1: steps: none given; steps is required", id="missing"),
        pytest.param("- {steps: 5, stpes: 4}", "stpes: 4 given; accepted fields are steps", id="unknown"),
        pytest.param("- {steps: 5, sampler: euler}", 'sampler: "euler" given', id="sampler"),
        pytest.param("[{steps: 5}, {steps: 5}]", "name: 5-steps given 2 times", id="names"),
        pytest.param("steps: 5", "a list of one or more entries is accepted", id="no-list"),
        pytest.param("[", "it is neither YAML nor JSON", id="syntax"),
    ],
)
def test_a_wrong_mix_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(text)
    code, output = bench("serve", "--rate", "1", "--mix", str(file))
    assert (code, output.count("\n")) == (2, 1), output
    assert message in output


def test_a_mix_is_read_from_json_as_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mix.json"
    fields = {"steps": 3, "class_id": "forest", "cfg_scale": 1, "guidance_interval": [0, 9]}
    file.write_text(json.dumps([fields | {"weight": 2}]))
    (entry,) = load_mix(file)
    assert entry.body(7) == {
        "seed": 7,
        "steps": 3,
        "sampler": "dpm++",
        "cfg_scale": 1.0,
        "guidance_interval": [0, 9],
        "class_id": "forest",
        "num_images": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "rate: None given with concurrency None", id="no-load"),
        pytest.param(["--rate", "1", "--arrivals", "burst:0"], "arrivals: burst:0 given", id="arrivals"),
        pytest.param(["--rate", "1", "--requests", "0"], "requests: 0 given", id="requests"),
        pytest.param(
            ["--concurrency", "5", "--requests", "39"],
            "requests: 39 given with a concurrency of 5; 40 or more",
            id="concurrency",
        ),
        pytest.param(["--rate", "1", "--slo-s", "-1"], "slo_s: -1 given", id="slo"),
        pytest.param(["--rate", "1", "--url", "http://127.0.0.1:9"], "no server answers there", id="url"),
    ],
)
def test_bench_serve_refuses_bad_input_in_one_line(arguments: list[str], message: str) -> None:
    code, output = bench("serve", *arguments)
    assert code == 2, output
    assert message in output


def test_bench_serve_measures_a_server(server_url: str, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text("- {steps: 2, resolution: 16}\n- {steps: 5, resolution: 16}")
    common = ("--url", server_url, "--mix", str(mix), "--requests", "24", "--output-dir", str(tmp_path))
    started = time.monotonic()
    code, output = bench("serve", *common, "--rate", "200", "--slo-s", "20")
    assert code == 0, output
    assert time.monotonic() - started < TIMEOUT_S
    content = json.loads((tmp_path / "serve.json").read_text())
    overall = content["run"]["overall"]
    assert overall["statuses"] == {"200": 24}
    assert overall["goodput_images_per_s"] == overall["images_per_s"] > 0
    assert all(overall["stages_s"][stage]["p99"] >= 0 for stage in ("queue", "denoise", "decode", "encode"))
    assert set(content["run"]["by_entry"]) == {"2-steps", "5-steps"}
    assert {"command", "packages", "cpu", "cpus"} <= content["environment"].keys()
    code, output = bench("serve", *common, "--concurrency", "3", "--name", "full")
    assert code == 0, output
    assert json.loads((tmp_path / "full.json").read_text())["run"]["saturated_images_per_s"] > 0


def test_the_load_average_is_that_before_the_run(
    server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own load says nothing of whether the machine was idle."""
    loads = iter([0.25, 9.0])
    monkeypatch.setattr("os.getloadavg", lambda: (next(loads), 0.0, 0.0))
    mix = tmp_path / "mix.yaml"
    mix.write_text("- {steps: 2, resolution: 16}")
    seen: list[float] = []
    monkeypatch.setattr("service.benchmark.load.check_server", lambda url, mix: seen.append(next(loads)))
    common = ("--url", server_url, "--mix", str(mix), "--requests", "2", "--output-dir", str(tmp_path))
    code, output = bench("serve", *common, "--rate", "50")
    assert (code, seen) == (0, [9.0]), output
    assert json.loads((tmp_path / "serve.json").read_text())["environment"]["load_average"] == 0.25


@pytest.mark.parametrize("command", ["serve", "batching"])
def test_without_the_client_the_extra_is_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    code, output = bench(command)
    assert (code, output.count("\n")) == (2, 1), output
    assert "extra `bench`" in output


def test_a_server_that_does_not_start_is_told_in_its_own_words() -> None:
    code, output = bench("serve", "--rate", "1", "--", "--batch-size", "4")
    assert (code, output.count("\n")) == (1, 1), output
    assert "the server ended with 2 before it was ready: lamamba: batch_size: 4 given" in output


def test_a_server_runs_in_the_folder_that_its_paths_are_relative_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import os, sys, service; sys.exit(os.getcwd())"
    with (
        pytest.raises(ServerNotStarted, match=f": {tmp_path.resolve()}$"),
        running_command([sys.executable, "-c", code]),
    ):
        pass


def test_all_that_a_server_says_before_its_last_words_is_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "import sys; sys.exit('a warning\\nthe reason')"
    with (
        pytest.raises(ServerNotStarted, match=r"ended with 1 before it was ready: the reason$"),
        running_command([sys.executable, "-c", code]),
    ):
        pass
    assert capsys.readouterr().err == "a warning\n"
    with (
        pytest.raises(ServerNotStarted, match="no-such-server: it cannot be run"),
        running_command(["no-such-server"]),
    ):
        pass


def test_a_server_that_does_not_start_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "sys.exit(3)"
    )
    with (
        pytest.raises(ServerNotStarted, match="ended with 3"),
        running_command([sys.executable, "-c", code, str(tmp_path / "pid")]),
    ):
        pass
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + TIMEOUT_S
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_bench_serve_repeats_the_servers_refusal(server_url: str) -> None:
    code, output = bench("serve", "--url", server_url, "--rate", "1")
    assert code == 2
    assert "10-steps: the server answers 422: resolution: 128 given" in output
