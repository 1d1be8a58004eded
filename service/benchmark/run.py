"""Runs of `lamamba bench serve` and `lamamba bench batching`, from what is asked to what is in the file."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from model.benchmark.environment import environment
from model.whole_file import write_json
from service.benchmark.arrivals import burst_size, plan_requests
from service.benchmark.load import Outcome, check_server, closed_loop, open_loop
from service.benchmark.mix import MixEntry, mean_images
from service.benchmark.server import running_command
from service.benchmark.summary import (
    REQUESTS_PER_CONCURRENCY,
    compare,
    saturated_images_per_s,
    summarize,
)

__all__ = [
    "SWEEP_SHARE",
    "BatchLimits",
    "LoadConfig",
    "Observer",
    "check_concurrency",
    "facts",
    "measure_open",
    "measure_saturated",
    "run_comparison",
]

SWEEP_SHARE: Final = 0.7
"""Of the largest capacity among the limits that are tried: the load at which their p95 are compared."""

Observer = Callable[[str, int], Callable[[Outcome], None]]
"""Is given a run's title and its number of requests; returns what hears of each outcome."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What all runs have in common; ValueError names a bad field, its value and what is accepted."""

    mix: tuple[MixEntry, ...]
    arrivals: str = "poisson"
    requests: int = 100
    """At most so many a run."""
    max_seconds: float = 300.0
    """No request of a run comes later than this."""
    timeout_s: float = 300.0
    """Within which a request has to be answered."""
    slo_s: float | None = None
    """For goodput: the longest latency, where an entry of the mix names none."""
    seed: int = 0

    def __post_init__(self) -> None:
        burst_size(self.arrivals)
        if not 1 <= self.requests <= 1_000_000:
            raise ValueError(f"requests: {self.requests} given; 1 to 1000000 is accepted")
        for name, value in (
            ("max_seconds", self.max_seconds),
            ("timeout_s", self.timeout_s),
            ("slo_s", self.slo_s),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value:g} given; above 0 is accepted")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} given; 0 or more is accepted")

    def describe(self) -> dict[str, Any]:
        """As in a results file."""
        return asdict(self) | {"mix": [entry.model_dump() | {"name": entry.label} for entry in self.mix]}


def facts() -> dict[str, Any]:
    """The environment, with what load depends on beside it."""
    return environment() | {"cpus": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)}


def check_concurrency(concurrency: int, requests: int) -> None:
    """Raises ValueError where that many requests do not measure a server that the concurrency saturates."""
    if concurrency < 1:
        raise ValueError(f"concurrency: {concurrency} given; 1 or more is accepted")
    if requests < REQUESTS_PER_CONCURRENCY * concurrency:
        raise ValueError(
            f"requests: {requests} given with a concurrency of {concurrency}; "
            f"{REQUESTS_PER_CONCURRENCY * concurrency} or more, {REQUESTS_PER_CONCURRENCY} times the "
            "concurrency, is accepted"
        )


def measure_open(
    url: str, config: LoadConfig, images_per_s: float, report: Callable[[Outcome], None]
) -> tuple[dict[str, Any], list[Outcome]]:
    """An open-loop run that asks for `images_per_s` on average: its figures and its outcomes."""
    planned = plan_requests(
        config.mix,
        rate_per_s=images_per_s / mean_images(config.mix),
        num_requests=config.requests,
        max_seconds=config.max_seconds,
        burst=burst_size(config.arrivals),
        seed=config.seed,
    )
    if not planned:
        raise ValueError(
            f"max_seconds: {config.max_seconds:g} given; at {images_per_s:g} images/s the first request "
            "comes later"
        )
    outcomes = asyncio.run(open_loop(url, planned, timeout_s=config.timeout_s, report=report))
    figures = {"loop": "open", "offered_images_per_s": round(images_per_s, 4)}
    return figures | summarize(outcomes, slo_s=config.slo_s), outcomes


def measure_saturated(
    url: str, config: LoadConfig, concurrency: int, report: Callable[[Outcome], None]
) -> tuple[dict[str, Any], list[Outcome]]:
    """A closed loop of `concurrency` (`check_concurrency`): its figures and its outcomes."""
    planned = plan_requests(config.mix, rate_per_s=math.inf, num_requests=config.requests, seed=config.seed)
    outcomes = asyncio.run(
        closed_loop(
            url,
            planned,
            concurrency=concurrency,
            timeout_s=config.timeout_s,
            max_seconds=config.max_seconds,
            report=report,
        )
    )
    rate = saturated_images_per_s(outcomes, concurrency)
    figures = {"loop": "closed", "concurrency": concurrency, "saturated_images_per_s": round(rate, 4)}
    return figures | summarize(outcomes, slo_s=config.slo_s), outcomes


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """When a batch of whole requests begins."""

    max_images: int
    wait_ms: float
    """Milliseconds that the first image waits for others."""

    @property
    def label(self) -> str:
        """As in `--sweep` and in results."""
        return f"{self.max_images}:{self.wait_ms:g}"

    @property
    def options(self) -> list[str]:
        """For a server's command."""
        return ["--batch-size", str(self.max_images), "--batch-wait-ms", f"{self.wait_ms:g}"]


def run_comparison(
    commands: Mapping[str, Sequence[str]],
    config: LoadConfig,
    *,
    reference: str,
    shares: Sequence[float],
    concurrency: int,
    path: Path,
    observer: Observer,
    sweep: Sequence[BatchLimits] = (),
) -> dict[str, Any]:
    """Measure each server when saturated, then all of them at shares of the reference's capacity.

    Share by share, one server after the other, each alone on the machine and with the same arrivals. The file
    is written after every run: what ends the program leaves the runs before in it.

    Args:
        commands: how each server is started, by the policy's name; `{port}` stands for the port.
        sweep: limits of the reference's batches to try first; it is compared with the best of them.

    Raises ValueError for what cannot be measured, ServerNotStarted where a server does not start.
    """
    if reference not in commands:
        raise ValueError(f"reference: {reference} given; one of {', '.join(commands)} is accepted")
    check_concurrency(concurrency, config.requests)
    head: dict[str, Any] = {
        "environment": facts(),
        "config": config.describe()
        | {"servers": {name: " ".join(command) for name, command in commands.items()}}
        | {"reference": reference, "shares": list(shares), "concurrency": concurrency},
    }
    if sweep:
        head["sweep"] = {"share": SWEEP_SHARE, "runs": [], "best": None}
        tried = {limits.label: [*commands[reference], *limits.options] for limits in sweep}
        runs = head["sweep"]["runs"]
        for run in _runs(tried, config, None, (SWEEP_SHARE,), concurrency, observer):
            runs.append(run)
            write_json(path, head)
        head["sweep"]["best"] = best = _lowest_p95(runs)
        commands = {**commands, reference: tried[best]}
        head["config"]["servers"][reference] = " ".join(tried[best])
    content: dict[str, Any] = head | {"runs": [], "comparison": []}
    for run in _runs(commands, config, reference, shares, concurrency, observer):
        content["runs"].append(run)
        content["comparison"] = compare(content["runs"], reference)
        write_json(path, content)
    return content


def _runs(
    commands: Mapping[str, Sequence[str]],
    config: LoadConfig,
    reference: str | None,
    shares: Sequence[float],
    concurrency: int,
    observer: Observer,
) -> Iterator[dict[str, Any]]:
    """Each server saturated, then each at shares of the reference's capacity; None: of the largest one."""
    capacity = 0.0
    for share in (None, *shares):
        for policy, command in commands.items():
            with running_command(command) as server:
                check_server(server.url, config.mix)
                title = f"{policy} {'saturated' if share is None else f'{share:.0%}'}"
                report = observer(title, config.requests)
                if share is None:
                    figures, _ = measure_saturated(server.url, config, concurrency, report)
                else:
                    figures, _ = measure_open(server.url, config, share * capacity, report)
            if share is None and reference in (None, policy):
                capacity = max(capacity, figures["saturated_images_per_s"])
            yield {"policy": policy, "share": share} | figures


def _lowest_p95(runs: Sequence[Mapping[str, Any]]) -> str:
    latencies = {
        run["policy"]: run["overall"]["latency_s"]["p95"]
        for run in runs
        if run["share"] is not None and run["overall"]["latency_s"]
    }
    if not latencies:
        raise ValueError("sweep: no request was answered with any of the limits")
    return min(latencies, key=lambda label: latencies[label])
