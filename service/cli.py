"""The `lamamba` command: the model's commands, `serve`, and `bench` of the server.

Commands import what they need when they run: `lamamba --help` and `--version` load neither torch nor the
server.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from model.benchmark.command import bench_app
from model.cli import app as model_app
from service.api_keys import key_hash, new_key, parse_key_hashes
from service.benchmark.command import serving_app
from service.errors import EngineFailure, StartupError
from service.settings import load_settings

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="LaMamba: train, sample and serve LaMamba-Diff image models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lamamba {version('lamamba')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LaMamba: train, sample and serve LaMamba-Diff image models."""


@app.command(
    epilog="Examples:  lamamba serve   |   lamamba serve --models folder --models org/name --port 8080   |   "
    "LAMAMBA_MAX_ROWS=64 lamamba serve --device cuda"
)
def serve(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models", help="A model folder or hub id; may be repeated. Default: the shipped models."
        ),
    ] = None,
    model_repository: Annotated[
        str | None,
        typer.Option(help="A folder whose sub-folders are models; admin requests load and unload them."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    gpus: Annotated[
        str | None, typer.Option(help="all, or numbers as in 0,1: an engine on each, in --device's place.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    scan_backend: Annotated[
        str | None, typer.Option(help="auto, reference, vectorized, mamba_cuda or triton.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="On CUDA, compile the network; slower start, faster steps."
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="A seed fixes an image to the bit; every step computes --max-rows rows.",
        ),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Network rows a step; a guided image takes 2.")] = None,
    batching: Annotated[str | None, typer.Option(help="continuous, or static to compare with.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of a static batch.")] = None,
    batch_wait_ms: Annotated[
        float | None, typer.Option(help="How long the first image of a static batch waits for others.")
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: the cgroup's quota.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_json: Annotated[
        bool | None, typer.Option("--log-json/--log-plain", help="Form of log records.")
    ] = None,
) -> None:
    """Serve models by HTTP; options override the LAMAMBA_* environment variables of the same names."""
    try:
        settings = load_settings(
            models=tuple(models) if models else None,
            model_repository=model_repository,
            host=host,
            port=port,
            device=device,
            gpus=gpus,
            dtype=dtype,
            scan_backend=scan_backend,
            compile=compile,
            deterministic=deterministic,
            max_rows=max_rows,
            batching=batching,
            batch_size=batch_size,
            batch_wait_ms=batch_wait_ms,
            num_threads=num_threads,
            log_level=log_level,
            log_json=log_json,
        )
        from service.logs import configure_logging
        from service.server import run_server

        configure_logging(settings.log_level, as_json=settings.log_json)
        run_server(settings)
    except (StartupError, EngineFailure) as error:
        typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2 if isinstance(error, StartupError) else 1) from error


@app.command("api-key")
def api_key(
    name: Annotated[str, typer.Argument(help="Who will use the key: what logs and metrics show.")],
) -> None:
    """Make an API key: prints the key, this once, and the line for LAMAMBA_API_KEYS or its file."""
    key = new_key()
    entry = f"{name}:{key_hash(key)}"
    try:
        parse_key_hashes([entry])
    except ValueError as error:
        typer.secho(f"lamamba: name: {name} given; {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    typer.echo(f"key   {key}")
    typer.echo(f"hash  {entry}")


app.registered_commands += model_app.registered_commands
app.registered_groups += [group for group in model_app.registered_groups if group.name != "bench"]

_bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure the network, and a server under load.",
)
_bench_app.registered_commands += bench_app.registered_commands + serving_app.registered_commands
app.add_typer(_bench_app, name="bench")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
