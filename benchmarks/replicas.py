"""Several servers behind a real load balancer: how late are answers, what do lost servers cost, and does the
simulation (`benchmarks/scale_sim.py`) know?

Replicas of `lamamba serve` on the CPU, each on cores of its own, behind HAProxy with the configuration of
docker/haproxy/haproxy.cfg; the client and HAProxy have the cores that are left. Three parts:

    steps           for each number of replicas, how long a step takes by its rows, in closed loops of 1 to 4
                    images on each, and how long an image takes beside its steps, before the load and after
                    it: the means feed the simulation
    latency         Poisson arrivals at a share of what so many replicas can make by these steps; the
                    simulation gets the same arrivals, and its percentiles stand beside the measured ones
    ends            the largest number of replicas, two of which end in mid-load: one by SIGTERM after a third
                    of the time, one by SIGKILL after two, each while it makes an image; the load is the share
                    of what the others can make. A client tries again after 429, 502, 503 and a connection
                    that failed

By the client's outcomes, HAProxy's log and the replicas' logs it is then checked that each request was
answered with its image, once; that the replica of SIGTERM answered all that it had accepted and ended with 0;
and that no replica answered an id twice. Exit code 1 where anything differs.

    python benchmarks/replicas.py                  # 4 replicas of 2 cores: 16 cores, some 13 minutes
    python benchmarks/replicas.py --replicas 1,3 --cores-per-replica 1 --phase-s 20   # a trial, anywhere
    python benchmarks/replicas.py --again benchmarks/results/replicas.json   # simulates its loads again
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scale_sim import Image, StepTimes, capacity, rows_of, simulate
from benchmarks.soak import logged_answers
from model.benchmark.environment import RESULTS
from model.benchmark.plot import can_plot
from model.pretrained import default_model_dir
from model.whole_file import write_json
from service.benchmark.arrivals import PlannedRequest, plan_requests
from service.benchmark.command import progress_observer
from service.benchmark.load import Outcome, Report, check_server, open_loop
from service.benchmark.mix import DEFAULT_MIX, MixEntry, load_mix
from service.benchmark.plot import finish, pyplot, save
from service.benchmark.run import LoadConfig, Observer, facts, measure_saturated
from service.benchmark.server import RunningServer, free_port, running_command, serve_command
from service.benchmark.summary import REQUESTS_PER_CONCURRENCY, percentiles, summarize

TEMPLATE = Path(__file__).resolve().parent.parent / "docker" / "haproxy" / "haproxy.cfg"
MAX_ROWS = 8
"""Of a step; what a server on the CPU has by default."""
RETRY_S = 0.25
TIMEOUT_S = 300.0
READY_LIMIT_S = 20.0
END_LIMIT_S = 120.0
NUM_ENDS = 2
_POLL_S = 0.05


@dataclass(frozen=True)
class Route:
    """One line of HAProxy's log: where a try went, and how it ended there."""

    request_id: str
    server: str
    status: int


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A server, with the log that it writes."""

    name: str
    server: RunningServer
    log: IO[bytes]

    def answered(self) -> list[str]:
        """Ids of the requests that it answered with an image, one each time."""
        self.log.seek(0)
        return [request_id for request_id, status in logged_answers(self.log.read()) if status == 200]


def spread(available: Sequence[int], replicas: int, each: int) -> tuple[list[list[int]], list[int]]:
    """The cores of each replica, and those of the client and HAProxy.

    Where there are too few, all share what there is: figures of such a run are not to be published.
    """
    if replicas * each < len(available):
        own = [list(available[index * each : (index + 1) * each]) for index in range(replicas)]
        return own, list(available[replicas * each :])
    return [list(available)] * replicas, list(available)


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Run this process, and what it starts, on those alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running_replicas(model: Path, cores: Sequence[Collection[int]]) -> Iterator[list[Replica]]:
    """A server on each set of cores, all ready."""
    options = ["--models", str(model.resolve()), "--device", "cpu", "--max-rows", str(MAX_ROWS)]
    command = serve_command([*options, "--log-level", "info", "--log-json"])
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in cores]
        starts = [running_command(command, cores=own, log=log) for own, log in zip(cores, logs, strict=True)]
        with ThreadPoolExecutor(len(starts)) as pool:
            servers = list(pool.map(stack.enter_context, starts))
        yield [
            Replica(name=f"lamamba-{number}", server=server, log=log)
            for number, (server, log) in enumerate(zip(servers, logs, strict=True), 1)
        ]


def configuration(template: str, port: int, servers: Mapping[str, str]) -> str:
    """The template with another port and other servers, whose addresses (HOST:PORT) are given by name."""
    text, binds = re.subn(r"(?m)^(\s+)bind .*$", rf"\1bind 127.0.0.1:{port}", template)
    text, lines = re.subn(r"(?m)^ +server .*\n", "", text)
    if binds != 1 or not lines:
        raise ValueError("load balancer: the configuration must have one `bind`, and servers at its end")
    return text + "".join(f"    server {name} {address}\n" for name, address in servers.items())


@contextmanager
def balanced(program: Path, servers: Mapping[str, str]) -> Iterator[tuple[str, Callable[[], list[Route]]]]:
    """HAProxy before servers, whose URLs are given by name: its URL, and what reads its log.

    Shared libraries are also looked for beside the program. Raises RuntimeError with its words where it does
    not serve.
    """
    port = free_port()
    addresses = {name: url.removeprefix("http://") for name, url in servers.items()}
    beside = str(program.resolve().parent)
    inherited = os.environ.get("LD_LIBRARY_PATH")
    environment = dict(os.environ) | {"LD_LIBRARY_PATH": f"{beside}:{inherited}" if inherited else beside}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        file = Path(folder) / "haproxy.cfg"
        file.write_text(configuration(TEMPLATE.read_text(encoding="utf-8"), port, addresses))
        process = subprocess.Popen(
            [str(program), "-db", "-f", str(file)], stdout=log, stderr=log, env=environment
        )

        def text() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + READY_LIMIT_S
            while not _ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"load balancer: {program} does not serve: {text().strip()}")
                time.sleep(_POLL_S)
            yield url, lambda: routes(text())
        finally:
            process.kill()
            process.wait()


def _urls(replicas: Iterable[Replica]) -> dict[str, str]:
    return {replica.name: replica.server.url for replica in replicas}


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def routes(log: str) -> list[Route]:
    """What HAProxy's log says of requests that have an id."""
    lines = re.findall(r"(?m)^([0-9a-f]{16}) (\S+) (-?\d+) ", log)
    return [Route(request_id, server, int(status)) for request_id, server, status in lines]


@dataclass(frozen=True)
class Feed:
    """What the simulation has to know of a replica."""

    step_s: StepTimes
    after_s: float
    """Of an image, beside its queueing and its steps: decoding, encoding, the ways there and back."""

    def mean_with(self, other: Feed) -> Feed:
        """Of two measurements at the same numbers of rows."""
        seconds = zip(self.step_s.seconds, other.step_s.seconds, strict=True)
        step_s = StepTimes(self.step_s.rows, tuple(statistics.fmean(both) for both in seconds))
        return Feed(step_s, statistics.fmean((self.after_s, other.after_s)))

    def to_dict(self) -> dict[str, Any]:
        """In milliseconds."""
        step_ms = {str(rows): round(1000 * self.step_s(rows), 2) for rows in self.step_s.rows}
        return {"step_ms": step_ms, "after_ms": round(1000 * self.after_s, 1)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Feed:
        """What `to_dict` has made."""
        step_s = {int(rows): ms / 1000 for rows, ms in saved["step_ms"].items()}
        return cls(StepTimes(tuple(step_s), tuple(step_s.values())), saved["after_ms"] / 1000)


def measure_steps(urls: Sequence[str], mix: Sequence[MixEntry], rounds: int, observer: Observer) -> Feed:
    """Of a step by its rows, and of an image beside its steps, in closed loops on all at once.

    What shares the cores with a step, above all the decoder of the images before, is in its time, and so is
    what replicas of one machine take from each other.
    """
    seconds: dict[int, float] = {}
    after: list[float] = []
    rows = max(rows_of(entry) for entry in mix)
    most = MAX_ROWS // rows
    for concurrency in range(1, most + 1):
        config = LoadConfig(mix=tuple(mix), requests=rounds * concurrency, timeout_s=TIMEOUT_S)
        report = observer(f"{len(urls)} replicas, {concurrency} at once", len(urls) * config.requests)

        def loop(
            url: str, config: LoadConfig = config, concurrency: int = concurrency, report: Report = report
        ) -> list[Outcome]:
            """Those outcomes between which the replica was never without so many images."""
            return measure_saturated(url, config, concurrency, report)[1][concurrency:-concurrency]

        with ThreadPoolExecutor(len(urls)) as pool:
            full = [outcome for outcomes in pool.map(loop, urls) for outcome in outcomes if outcome.ok]
        denoised = sum(outcome.timings["denoise"] for outcome in full)
        seconds[rows * concurrency] = denoised / sum(outcome.entry.steps for outcome in full)
        after += [o.latency_s - o.timings["queue"] - o.timings["denoise"] for o in full]
    return Feed(StepTimes(tuple(seconds), tuple(seconds.values())), statistics.fmean(after))


def simulated(planned: Sequence[PlannedRequest], *, replicas: int, feed: Feed) -> list[float]:
    """Latencies of the same requests in the simulation."""
    images = [
        Image(came_at=request.at_s, steps_left=request.entry.steps, rows=rows_of(request.entry))
        for request in planned
    ]
    simulate(
        images,
        num_replicas=replicas,
        max_rows=MAX_ROWS,
        step_s=feed.step_s,
        balancer="least",
        draw=random.Random(0),
        after_s=feed.after_s,
    )
    return [image.finished_at - image.came_at + feed.after_s for image in images]


def compared(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, Any]:
    """Percentiles beside each other; errors are relative to what was measured."""
    return {
        "measured_s": measured,
        "simulated_s": predicted,
        "error": {name: round(predicted[name] / measured[name] - 1, 4) for name in measured},
    }


async def load_with_ends(
    url: str,
    planned: Sequence[PlannedRequest],
    ends: Sequence[tuple[float, RunningServer, signal.Signals]],
    report: Report,
) -> tuple[list[Outcome], list[float]]:
    """The outcomes of a client that tries again, and when each server got its signal.

    That is as soon as, from its time on, the server has begun an image: an end that concerns nobody shows
    nothing.
    """
    started = time.perf_counter()

    async with (
        httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        sending = group.create_task(
            open_loop(url, planned, timeout_s=TIMEOUT_S, retry_s=RETRY_S, report=report)
        )

        async def end(at_s: float, server: RunningServer, number: signal.Signals) -> float:
            await asyncio.sleep(at_s)
            before = running = await _num_running(client, server.url)
            while not sending.done() and running <= before:
                await asyncio.sleep(_POLL_S)
                before, running = running, await _num_running(client, server.url)
            server.process.send_signal(number)
            return time.perf_counter() - started

        ending = [group.create_task(end(*one)) for one in ends]
    return sending.result(), [task.result() for task in ending]


async def _num_running(client: httpx.AsyncClient, url: str) -> float:
    lines = (await client.get(f"{url}/metrics")).text.splitlines()
    running = [line for line in lines if line.startswith("lamamba_num_requests_running{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in running)


def faults_of(
    outcomes: Sequence[Outcome],
    taken: Sequence[Route],
    answered: Mapping[str, Sequence[str]],
    *,
    terminated: str,
    exit_code: int | None,
) -> list[str]:
    """What is not as it must be, in words.

    `answered`: by replica, the ids that its log says it answered with an image.
    """
    faults = [f"request at {o.at_s:.2f} s: {o.status} after {o.tries} tries" for o in outcomes if not o.ok]
    if exit_code != 0:
        faults.append(f"{terminated}: ended with {exit_code}")
    times = Counter(request_id for ids in answered.values() for request_id in ids)
    faults += [f"{request_id}: answered {count} times" for request_id, count in times.items() if count > 1]
    received = {outcome.request_ids[-1] for outcome in outcomes if outcome.ok}
    faults += [f"{request_id}: received, and in no replica's log" for request_id in received - set(times)]
    faults += [
        f"{request_id}: {terminated} answered it, and nobody received that"
        for request_id in answered[terminated]
        if request_id not in received
    ]
    faults += [
        f"{route.request_id}: {terminated} had it, and it ended with {route.status}"
        for route in taken
        if route.server == terminated and route.status not in (200, 429, 503)
    ]
    return faults


def end_figures(
    outcomes: Sequence[Outcome],
    taken: Sequence[Route],
    answered: Mapping[str, Sequence[str]],
    ended_at: Mapping[str, float],
) -> dict[str, Any]:
    """How many requests the ends of servers concerned."""
    server_of = {route.request_id: route.server for route in taken}

    def open_at_the_end(name: str) -> int:
        return sum(
            server_of.get(outcome.request_ids[-1]) == name
            and outcome.sent_s < ended_at[name] < outcome.done_s
            for outcome in outcomes
        )

    made = {request_id for ids in answered.values() for request_id in ids}
    return {
        "planned": len(outcomes),
        "answered": sum(outcome.ok for outcome in outcomes),
        "tried_again": sum(outcome.tries > 1 for outcome in outcomes),
        "made_more_than_once": sum(len(made.intersection(o.request_ids)) > 1 for o in outcomes),
        "answered_after_sigterm": open_at_the_end(next(iter(ended_at))),
        "tries_by_status": dict(sorted(Counter(str(route.status) for route in taken).items())),
        "by_server": dict(sorted(Counter(route.server for route in taken if route.status == 200).items())),
    }


def plot(content: Mapping[str, Any], path: Path) -> Path:
    """Latencies beside the simulation's, and each request around the ends of the servers, to `path` (PNG)."""
    results = content["results"]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    rows = results["latency"]
    for name, style, marker in (("p95", "-", "o"), ("p50", ":", "v")):
        for source, color in (("measured_s", "#c2410c"), ("simulated_s", "#1d4ed8")):
            left.plot(
                [row["replicas"] for row in rows],
                [row[source][name] for row in rows],
                style,
                marker=marker,
                color=color,
                label=f"{source.removesuffix('_s')}, {name}",
            )
    left.set_xticks([row["replicas"] for row in rows])
    left.set_xlabel("replicas")
    left.set_ylim(bottom=0)
    left.set_ylabel("latency, s")
    left.set_title(f"at {results['share']:.0%} of their capacity", fontsize=10)
    finish(left)
    ends = results["ends"]
    for tries, label, color in ((1, "at the first try", "#525252"), (2, "tried again", "#c2410c")):
        points = [
            (request["at_s"], request["latency_s"])
            for request in ends["requests"]
            if min(2, request["tries"]) == tries
        ]
        if points:
            right.scatter(*zip(*points, strict=True), s=8, color=color, label=f"{label} ({len(points)})")
    for name, at_s in ends["ended_at_s"].items():
        right.axvline(at_s, color="#1d4ed8", linestyle="--", linewidth=1)
        right.annotate(f" {name}", (at_s, 0), xycoords=("data", "axes fraction"), fontsize=8, va="bottom")
    right.set_xlabel("when the request came, s")
    right.set_ylabel("latency, s")
    right.set_ylim(bottom=-0.5)  # below the points, where the signals' names are
    right.set_title(f"{ends['replicas']} replicas, two of which end", fontsize=10)
    finish(right)
    return save(figure, content["environment"], path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load-balancer", type=Path, help="HAProxy's program; default: the one of PATH")
    parser.add_argument("--model", type=Path, default=default_model_dir(128), help="one model folder")
    parser.add_argument("--mix", type=Path, help="as of `lamamba bench serve`; default: 10 to 50 steps")
    parser.add_argument("--replicas", default="1,2,4", help="numbers to measure; the largest one, 3 or more")
    parser.add_argument("--cores-per-replica", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.7, help="of what the replicas can make")
    parser.add_argument("--phase-s", type=float, default=60.0, help="length of each load, in seconds")
    parser.add_argument("--requests", type=int, default=100_000, help="most of each load")
    parser.add_argument("--rounds", type=int, default=8, help="images of a closed loop, by its concurrency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", type=Path, help="only simulate the loads of this file of results again, and draw it"
    )
    parser.add_argument("--name", default="replicas", help="of the results file")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.again is not None:
        content = json.loads(given.again.read_text(encoding="utf-8"))
        simulate_again(content["results"])
        write_json(given.again, content)
        print(plot(content, given.again.with_suffix(".png")))
        return
    try:
        numbers = sorted({int(text) for text in given.replicas.split(",")})
        if numbers[0] < 1 or numbers[-1] <= NUM_ENDS:
            raise ValueError(f"replicas: {given.replicas} given; 1 and more, the largest 3 or more")
        if not 0 < given.share < 1 or given.phase_s <= 0 or given.cores_per_replica < 1 or given.requests < 1:
            raise ValueError("share: above 0, below 1; phase-s: above 0; cores-per-replica, requests: 1 on")
        if given.rounds < REQUESTS_PER_CONCURRENCY:
            raise ValueError(f"rounds: {given.rounds} given; {REQUESTS_PER_CONCURRENCY} or more is accepted")
        mix = DEFAULT_MIX if given.mix is None else load_mix(given.mix)
        if several := [entry.label for entry in mix if entry.num_images > 1]:
            raise ValueError(f"mix: {several[0]} has several images; the simulation knows requests of one")
        program = given.load_balancer or shutil.which("haproxy")
        if program is None or not os.access(program, os.X_OK):
            raise ValueError(f"load-balancer: {program or 'none'} given; HAProxy's program is accepted")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    faults = run(given, numbers, mix, Path(program))
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
        raise SystemExit(1)


def run(
    given: argparse.Namespace, numbers: Sequence[int], mix: Sequence[MixEntry], program: Path
) -> list[str]:
    """All three parts and their file; the faults."""
    own, rest = spread(sorted(os.sched_getaffinity(0)), numbers[-1], given.cores_per_replica)
    results: dict[str, Any] = {
        "replicas": numbers,
        "share": given.share,
        "cores": own,
        "cores_of_client_and_balancer": rest,
        "cores_apart": not set(rest) & set(own[0]),
        "balancer": _version(program),
        "mix": [entry.model_dump() | {"name": entry.label} for entry in mix],
        "arrivals": {"requests": given.requests, "phase_s": given.phase_s, "seed": given.seed},
        "latency": [],
    }
    content = {"environment": facts(), "results": results}
    path = given.output_dir / f"{given.name}.json"
    with on_cores(rest), running_replicas(given.model, own) as replicas, progress_observer() as observer:
        for replica in replicas:
            check_server(replica.server.url, mix)
        for number in numbers:
            loaded = replicas[:number]
            urls = [replica.server.url for replica in loaded]
            before = measure_steps(urls, mix, given.rounds, observer)
            each = capacity(mix, MAX_ROWS, before.step_s)
            rate = round(given.share * number * each, 4)
            plan = arrivals_at(rate, mix, **results["arrivals"])
            with balanced(program, _urls(loaded)) as (url, _):
                report = observer(f"{number} replicas, balanced", len(plan))
                outcomes = asyncio.run(open_loop(url, plan, timeout_s=TIMEOUT_S, report=report))
            figures = summarize(outcomes)
            after = measure_steps(urls, mix, given.rounds, observer)
            results["latency"].append(
                {
                    "replicas": number,
                    "offered_images_per_s": rate,
                    "images_per_s_of_a_full_replica": round(each, 4),
                    "before": before.to_dict(),
                    "after": after.to_dict(),
                    "run": figures,
                }
            )
            simulate_again(results)
            write_json(path, content)  # what ends the program leaves the parts before in it
        rate = given.share * (len(replicas) - NUM_ENDS) * each
        plan = arrivals_at(rate, mix, **results["arrivals"])
        ends, faults = measure_ends(program, replicas, plan, observer("two replicas end", len(plan)))
    results |= {"ends": ends, "faults": faults}
    print(write_json(path, content))
    for row in (*results["latency"], ends):
        print(json.dumps({name: value for name, value in row.items() if name not in ("run", "requests")}))
    if can_plot():
        print(plot(content, path.with_suffix(".png")))
    return faults


def simulate_again(results: dict[str, Any]) -> None:
    """Set the simulation's percentiles beside the measured ones, of each load in the results."""
    mix = [MixEntry(**entry) for entry in results["mix"]]
    for row in results["latency"]:
        feed = Feed.from_dict(row["before"]).mean_with(Feed.from_dict(row["after"]))
        plan = arrivals_at(row["offered_images_per_s"], mix, **results["arrivals"])
        predicted = percentiles(simulated(plan, replicas=row["replicas"], feed=feed))
        row |= compared(row["run"]["overall"]["latency_s"] or {}, predicted or {})


def arrivals_at(
    images_per_s: float, mix: Sequence[MixEntry], *, requests: int, phase_s: float, seed: int
) -> list[PlannedRequest]:
    """The requests of one load. Raises ValueError where none comes in time."""
    planned = plan_requests(
        mix, rate_per_s=images_per_s, num_requests=requests, max_seconds=phase_s, seed=seed
    )
    if not planned:
        raise ValueError(f"phase-s: {phase_s:g} given; at {images_per_s:.2f} images/s nothing comes")
    return planned


def measure_ends(
    program: Path, replicas: Sequence[Replica], plan: Sequence[PlannedRequest], report: Report
) -> tuple[dict[str, Any], list[str]]:
    """The last part: its figures and its faults."""
    terminated, killed = replicas[:NUM_ENDS]
    last_s = plan[-1].at_s
    ends = [
        (last_s / 3, terminated.server, signal.SIGTERM),
        (2 * last_s / 3, killed.server, signal.SIGKILL),
    ]
    before = {replica.name: len(replica.answered()) for replica in replicas}
    with balanced(program, _urls(replicas)) as (url, log):
        outcomes, times = asyncio.run(load_with_ends(url, plan, ends, report))
        try:
            exit_code = terminated.server.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        taken = log()
    answered = {replica.name: replica.answered()[before[replica.name] :] for replica in replicas}
    ended_at = dict(zip((terminated.name, killed.name), times, strict=True))
    figures = end_figures(outcomes, taken, answered, ended_at) | {
        "replicas": len(replicas),
        "exit_code_after_sigterm": exit_code,
        "ended_at_s": {number.name: round(at_s, 3) for (_, _, number), at_s in zip(ends, times, strict=True)},
        "run": summarize(outcomes),
        "requests": [
            {"at_s": round(o.at_s, 3), "latency_s": round(o.latency_s, 4), "tries": o.tries} for o in outcomes
        ],
    }
    faults = faults_of(outcomes, taken, answered, terminated=terminated.name, exit_code=exit_code)
    if not figures["answered_after_sigterm"]:
        faults.append(f"{terminated.name}: had nothing to answer when SIGTERM came, which so shows nothing")
    return figures, faults


def _version(program: Path) -> str:
    said = subprocess.run([str(program), "-v"], capture_output=True, text=True, check=False).stdout
    return said.partition(" - ")[0].strip()


if __name__ == "__main__":
    main()
