"""The commands `lamamba bench serve` and `lamamba bench batching`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.usage import usage_errors

if TYPE_CHECKING:
    from service.benchmark.load import Outcome
    from service.benchmark.run import BatchLimits, LoadConfig, Observer

__all__ = ["progress_observer", "serving_app"]

serving_app = typer.Typer()

_ServeOptions = Annotated[
    list[str] | None,
    typer.Argument(help="Options of the `lamamba serve` that is started, after --.", show_default=False),
]
_Mix = Annotated[
    Path | None,
    typer.Option(help="YAML or JSON file of what is asked for; by default 10 to 50 steps at 128 px."),
]
_Arrivals = Annotated[str, typer.Option(help="poisson, or burst:N for N requests at once.")]
_Requests = Annotated[int, typer.Option(help="Most requests of a run.")]
_MaxSeconds = Annotated[float, typer.Option(help="No request of a run comes later.")]
_TimeoutS = Annotated[float, typer.Option(help="Seconds within which a request has to be answered.")]
_SloS = Annotated[float | None, typer.Option(help="Latency within which an answer counts as goodput.")]
_Seed = Annotated[int, typer.Option(help="Of arrivals, kinds of requests and images.")]
_OutputDir = Annotated[
    Path | None, typer.Option(help="Where results go; by default benchmarks/results in a checkout.")
]


@serving_app.command(
    "serve",
    epilog="Examples:  lamamba bench serve --rate 2 --slo-s 3   |   "
    "lamamba bench serve --url http://localhost:8000 --rate 5 --arrivals burst:8   |   "
    "lamamba bench serve --concurrency 16 --requests 200 -- --batching static --batch-size 4",
)
def bench_serve(
    serve_options: _ServeOptions = None,
    url: Annotated[
        str | None, typer.Option(help="A server that runs; by default one is started for the run.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Images a second to ask for, in an open loop.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Instead of a rate: requests that are always unanswered.")
    ] = None,
    mix: _Mix = None,
    arrivals: _Arrivals = "poisson",
    requests: _Requests = 100,
    max_seconds: _MaxSeconds = 300.0,
    timeout_s: _TimeoutS = 300.0,
    slo_s: _SloS = None,
    seed: _Seed = 0,
    output_dir: _OutputDir = None,
    name: Annotated[str, typer.Option(help="Of the results file.")] = "serve",
) -> None:
    """Put a server under load: throughput, goodput, latencies and where they come from."""
    with _bench_errors():
        config = _config(mix, arrivals, requests, max_seconds, timeout_s, slo_s, seed)
        if (rate is None) == (concurrency is None):
            raise ValueError(f"rate: {rate} given with concurrency {concurrency}; one of the two is accepted")
        own_options = serve_options or []
        if url is not None and own_options:
            raise ValueError(f"url: {url} given with {shlex.join(own_options)}; that server runs already")
        from model.benchmark.environment import RESULTS
        from model.whole_file import write_json
        from service.benchmark.load import check_server
        from service.benchmark.plot import plot_run
        from service.benchmark.run import check_concurrency, facts, measure_open, measure_saturated

        if concurrency is not None:
            check_concurrency(concurrency, config.requests)
        environment = facts()
        with _server_url(url, own_options) as address, progress_observer() as observer:
            check_server(address, config.mix)
            report = observer("requests", config.requests)
            if concurrency is not None:
                figures, outcomes = measure_saturated(address, config, concurrency, report)
            else:
                figures, outcomes = measure_open(address, config, rate or 0.0, report)
    content = {
        "environment": environment,
        "config": config.describe() | {"server": url or shlex.join(["lamamba", "serve", *own_options])},
        "run": figures,
        "requests": [
            {
                "entry": outcome.entry.label,
                "at_s": round(outcome.at_s, 4),
                "latency_s": round(outcome.latency_s, 4),
                "status": outcome.status,
                "timings": outcome.timings,
            }
            for outcome in outcomes
        ],
    }
    path = write_json((output_dir or RESULTS) / f"{name}.json", content)
    _show([{"policy": "server", "share": None} | figures])
    _draw(path, lambda picture: plot_run(content, picture))


@serving_app.command(
    "batching",
    epilog="Examples:  lamamba bench batching -- --models folder --max-rows 16   |   "
    'lamamba bench batching --policy continuous= --policy "static=--batching static --batch-size 4" '
    '--peer "litserve=python benchmarks/litserve_server.py --port {port}"',
)
def bench_batching(
    serve_options: _ServeOptions = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help='NAME=OPTIONS of a `lamamba serve`; may be repeated. Default: "continuous=--batching '
            'continuous" and "static=--batching static".',
            show_default=False,
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COMMAND of another server, {port} in it; may be repeated."),
    ] = None,
    reference: Annotated[str, typer.Option(help="Whose capacity the shares are of.")] = "static",
    sweep: Annotated[
        str | None,
        typer.Option(
            help="N:W,N:W: batch sizes and waits in ms of the reference to try first; the one of the lowest "
            "p95, at the same load, is compared."
        ),
    ] = None,
    shares: Annotated[str, typer.Option(help="Of the capacity, comma-separated.")] = "0.3,0.5,0.7,0.9",
    concurrency: Annotated[int, typer.Option(help="Unanswered requests that saturate a server.")] = 16,
    mix: _Mix = None,
    arrivals: _Arrivals = "poisson",
    requests: _Requests = 200,
    max_seconds: _MaxSeconds = 300.0,
    timeout_s: _TimeoutS = 300.0,
    slo_s: _SloS = None,
    seed: _Seed = 0,
    output_dir: _OutputDir = None,
    name: Annotated[str, typer.Option(help="Of the results file.")] = "batching",
) -> None:
    """Compare ways to batch: capacity, then latency at shares of the reference's capacity."""
    with _bench_errors():
        config = _config(mix, arrivals, requests, max_seconds, timeout_s, slo_s, seed)
        from model.benchmark.environment import RESULTS
        from service.benchmark.plot import plot_comparison
        from service.benchmark.run import run_comparison
        from service.benchmark.server import serve_command

        common_options = serve_options or []
        policies = policy or ["continuous=--batching continuous", "static=--batching static"]
        commands = {
            name: serve_command([*common_options, *options])
            for name, options in (_named(text, "policy") for text in policies)
        }
        for text in peer or ():
            peer_name, command = _named(text, "peer")
            if not command:
                raise ValueError(f"peer: {text} given; NAME=COMMAND is accepted")
            if peer_name in commands:
                raise ValueError(f"peer: {peer_name} given 2 times; names must differ")
            commands[peer_name] = command
        path = (output_dir or RESULTS) / f"{name}.json"
        with progress_observer() as observer:
            content = run_comparison(
                commands,
                config,
                reference=reference,
                shares=_parse_shares(shares),
                concurrency=concurrency,
                path=path,
                observer=observer,
                sweep=_parse_sweep(sweep) if sweep is not None else (),
            )
    if sweep is not None:
        _show(content["sweep"]["runs"])
        typer.echo(f"{reference} is measured with {content['sweep']['best']}")
    _show(content["runs"])
    for row in content["comparison"]:
        typer.echo(_ratios(row))
    _draw(path, lambda picture: plot_comparison(content, picture))


@contextmanager
def _bench_errors() -> Iterator[None]:
    """One line and exit code 2 for a wrong use or a missing client, and 1 where a server does not start."""
    with usage_errors():
        if find_spec("httpx") is None:
            raise ValueError("httpx: not installed; it is in the extra `bench`: pip install 'lamamba[bench]'")
        from service.benchmark.server import ServerNotStarted

        try:
            yield
        except ServerNotStarted as error:
            typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error


def _config(
    mix: Path | None,
    arrivals: str,
    requests: int,
    max_seconds: float,
    timeout_s: float,
    slo_s: float | None,
    seed: int,
) -> LoadConfig:
    from service.benchmark.mix import DEFAULT_MIX, load_mix
    from service.benchmark.run import LoadConfig

    return LoadConfig(
        mix=DEFAULT_MIX if mix is None else load_mix(mix),
        arrivals=arrivals,
        requests=requests,
        max_seconds=max_seconds,
        timeout_s=timeout_s,
        slo_s=slo_s,
        seed=seed,
    )


def _named(text: str, option: str) -> tuple[str, list[str]]:
    name, equals, words = text.partition("=")
    if not name or not equals:
        raise ValueError(f"{option}: {text} given; NAME=WORDS is accepted")
    try:
        return name, shlex.split(words)
    except ValueError as error:
        raise ValueError(f"{option}: {text} given; {str(error).lower()}") from error


def _parse_shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 10 for share in shares):
        raise ValueError(f"shares: {text} given; numbers above 0 and up to 10, with commas between")
    return shares


def _parse_sweep(text: str) -> tuple[BatchLimits, ...]:
    from service.benchmark.run import BatchLimits

    pairs = [re.fullmatch(r"([1-9]\d*):(\d+(?:\.\d+)?)", part) for part in text.split(",")]
    sweep = tuple(
        BatchLimits(max_images=int(pair.group(1)), wait_ms=float(pair.group(2))) for pair in pairs if pair
    )
    if len(sweep) < len(pairs):
        raise ValueError(f"sweep: {text} given; N:W with commas between, N images and W ms, is accepted")
    return sweep


@contextmanager
def _server_url(url: str | None, serve_options: Sequence[str]) -> Iterator[str]:
    if url is not None:
        yield url.rstrip("/")
        return
    from service.benchmark.server import running_command, serve_command

    with running_command(serve_command(serve_options)) as server:
        yield server.url


@contextmanager
def progress_observer() -> Iterator[Observer]:
    """A line of progress for each run; nothing where none begins."""
    from model.progress import progress_display

    progress = progress_display()
    with ExitStack() as shown:

        def observe(title: str, total: int) -> Callable[[Outcome], None]:
            if not progress.tasks:
                shown.enter_context(progress)
            task = progress.add_task(title, total=total)
            return lambda outcome: progress.advance(task)

        yield observe


def _show(runs: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "server", "load", "requests", "failed", "images/s", "goodput", "p50 s", "p95 s", "p99 s", box=None
    )
    for run in runs:
        load = "saturated" if run["loop"] == "closed" else f"{run['offered_images_per_s']:.2f} images/s"
        rate = run.get("saturated_images_per_s", run["overall"]["images_per_s"])
        for label, figures in {"": run["overall"], **run["by_entry"]}.items():
            latency = figures["latency_s"] or {}
            goodput = figures["goodput_images_per_s"]
            table.add_row(
                (label and f"  {label}") or run["policy"],
                "" if label else load,
                str(figures["requests"]),
                str(figures["requests"] - figures["statuses"].get("200", 0)),
                f"{figures['images_per_s'] if label else rate:.3f}",
                "" if goodput is None else f"{goodput:.3f}",
                *(f"{latency[name]:.2f}" if latency else "" for name in ("p50", "p95", "p99")),
            )
    Console(width=max(100, Console().width)).print(table)


def _ratios(row: dict[str, Any]) -> str:
    if row["share"] is None:
        return f"{row['policy']} / {row['over']}, saturated: throughput {row['throughput']:.2f}x"
    ratios = {"all requests": row["p95"], **row["p95_by_entry"]}
    words = ", ".join(f"{label} {ratio:.2f}x" for label, ratio in ratios.items() if ratio is not None)
    return f"{row['policy']} / {row['over']}, {row['share']:.0%}: p95 of {words}"


def _draw(path: Path, plot: Callable[[Path], Path]) -> None:
    from model.benchmark.plot import can_plot

    typer.echo(str(path))
    if can_plot():
        typer.echo(str(plot(path.with_suffix(".png"))))
    else:
        typer.echo("no plot without matplotlib (extra `bench`)")
