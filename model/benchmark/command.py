"""The commands `lamamba bench model`, `images`, `random-model` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.benchmark.config import DEFAULT_BACKENDS, DEFAULT_SHAPES
from model.usage import usage_errors

if TYPE_CHECKING:
    import torch

__all__ = ["bench_app"]

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure the network's speed beside DiT and mamba-ssm.",
)

_TABLE_WIDTH = 170  # where the output is no terminal, rich would take 80

_OutputDir = Annotated[
    Path | None, typer.Option(help="Where results go; by default benchmarks/results in a checkout.")
]
_Device = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")]
_Name = Annotated[str | None, typer.Option(help="Of the results file; by default after the card.")]
_CompileCache = Annotated[
    Path | None,
    typer.Option(help="A folder that torch.compile's results are kept in; by default each run starts cold."),
]
_Numerics = Annotated[str | None, typer.Option(help="bf16 or fp32; by default bf16 on CUDA.")]


@bench_app.command(
    "model",
    epilog="Examples:  lamamba bench model --max-seconds 540   |   "
    "lamamba bench model --shapes 2x32,128x32 --backends triton   |   "
    "lamamba bench model --shapes 128x32 --profile triton/eager   |   "
    "lamamba bench model --device cpu --preset tiny --shapes 1x8,2x16",
)
def bench_model(
    preset: Annotated[str, typer.Option(help="S, B, L, XL, or tiny for a dry run.")] = "XL",
    shapes: Annotated[
        str, typer.Option(help="ROWSxSIDE of latents, comma-separated.", show_default=False)
    ] = DEFAULT_SHAPES,
    providers: Annotated[
        str, typer.Option(help="Of lamamba, dit, mamba-ssm (scans alone).")
    ] = "lamamba,dit,mamba-ssm",
    scopes: Annotated[str, typer.Option(help="Of forward, scan.")] = "forward,scan",
    backends: Annotated[
        str, typer.Option(help="Scan backends of ours: triton, mamba_cuda, vectorized, reference.")
    ] = ",".join(DEFAULT_BACKENDS),
    variants: Annotated[
        str | None, typer.Option(help="Patterns of variants' names, e.g. */eager,compile+graph.")
    ] = None,
    numerics: _Numerics = None,
    d_state: Annotated[int, typer.Option(help="N, our SSM's state size.")] = 1,
    repeats: Annotated[int, typer.Option(help="Samples of each variant and shape.")] = 30,
    variant_limit: Annotated[float, typer.Option(help="Seconds for the samples of one variant.")] = 10.0,
    max_seconds: Annotated[
        float | None, typer.Option(help="After this, what is left is reported as not run.")
    ] = None,
    energy_seconds: Annotated[float, typer.Option(help="Of each best variant; 0 is off.")] = 2.0,
    profile: Annotated[str | None, typer.Option(help="A variant whose kernels are listed.")] = None,
    compile_cache: _CompileCache = None,
    device: _Device = None,
    output_dir: _OutputDir = None,
    name: _Name = None,
) -> None:
    """Time forwards and scans: each backend, each level of optimization, beside DiT and mamba-ssm."""
    with usage_errors():
        from model.benchmark.config import BenchConfig, comma_separated, parse_shapes

        place = _resolved(device)
        config = BenchConfig(
            preset=preset,
            d_state=d_state,
            shapes=parse_shapes(shapes),
            providers=comma_separated(providers),
            scopes=comma_separated(scopes),
            backends=comma_separated(backends),
            variants=comma_separated(variants or ""),
            numerics=numerics or _default_numerics(place),
            repeats=repeats,
            variant_limit_s=variant_limit,
            max_seconds=max_seconds,
            energy_seconds=energy_seconds,
            profile=profile,
        )
    from model.benchmark.environment import RESULTS
    from model.benchmark.forward import DisagreementError
    from model.benchmark.run import run_model_benchmark

    try:
        path, content = run_model_benchmark(
            config,
            place,
            output_dir=output_dir or RESULTS,
            name=name,
            cache=compile_cache,
            report=_echo_row,
        )
    except DisagreementError as error:
        typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    _show(content, path)


@bench_app.command(
    "images",
    epilog="Examples:  lamamba bench images --shapes 64x32 --steps 250   |   "
    "lamamba bench images --device cpu --preset tiny --shapes 2x8 --steps 4",
)
def bench_images(
    preset: Annotated[str, typer.Option(help="S, B, L, XL, or tiny for a dry run.")] = "XL",
    shapes: Annotated[
        str, typer.Option(help="IMAGESxSIDE of latents, comma-separated.")
    ] = "64x32,8x64,4x128",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 250,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpm++.")] = "ddpm",
    level: Annotated[
        str | None, typer.Option(help="eager, compile-blocks, compile or max-autotune; by default the best.")
    ] = None,
    scan_backend: Annotated[
        str, typer.Option(help="auto, reference, vectorized, mamba_cuda or triton.")
    ] = "auto",
    numerics: _Numerics = None,
    repeats: Annotated[int, typer.Option(help="Batches of each network that are timed.")] = 2,
    compile_cache: _CompileCache = None,
    device: _Device = None,
    output_dir: _OutputDir = None,
    name: _Name = None,
) -> None:
    """Make images from noise to pixels with guidance, ours and DiT in the same loop."""
    with usage_errors():
        from model.benchmark.config import parse_shapes

        wanted = parse_shapes(shapes)
        place = _resolved(device)
        from model.benchmark.sampling import ImagesConfig, images_table, run_images_benchmark
        from model.network.scan import resolve_scan_backend

        config = ImagesConfig(
            preset=preset,
            shapes=wanted,
            steps=steps,
            sampler=sampler,
            level=level,
            scan_backend=resolve_scan_backend(scan_backend, place).name,
            numerics=numerics or _default_numerics(place),
            repeats=repeats,
        )
    from rich.console import Console

    from model.benchmark.environment import RESULTS

    path, content = run_images_benchmark(
        config,
        place,
        output_dir=output_dir or RESULTS,
        name=name,
        cache=compile_cache,
        report=_echo_images,
    )
    Console(width=max(_TABLE_WIDTH, Console().width)).print(images_table(content["results"]))
    typer.echo(str(path))


@bench_app.command(
    "random-model",
    epilog="Examples:  lamamba bench random-model /tmp/xl-256   |   "
    "lamamba bench random-model /tmp/tiny --preset tiny --resolution 64 --device cpu",
)
def bench_random_model(
    folder: Annotated[Path, typer.Argument(help="A new folder, which `lamamba serve --models` takes.")],
    preset: Annotated[str, typer.Option(help="S, B, L, XL, or tiny for a dry run.")] = "XL",
    resolution: Annotated[int, typer.Option(help="Pixels along a side of its images.")] = 256,
    device: _Device = None,
) -> None:
    """Write a model of random weights: it is as fast as a trained one, and can be served and measured."""
    with usage_errors():
        place = _resolved(device)
        from model.benchmark.random_model import write_random_model

        write_random_model(folder, preset, resolution, place)
    typer.echo(str(folder))


@bench_app.command(
    "report",
    epilog="Examples:  lamamba bench report benchmarks/results/model-h100.json   |   "
    "lamamba bench report part-1.json part-2.json --out benchmarks/results/model-h100.json",
)
def bench_report(
    files: Annotated[list[Path], typer.Argument(help="Results of `lamamba bench model`.")],
    out: Annotated[Path | None, typer.Option(help="Where several files go, joined.")] = None,
) -> None:
    """Show results again, join those of several runs on one card, draw the plot."""
    with usage_errors():
        from model.benchmark.summary import join, read

        contents = [read(file) for file in files]
        if len(files) > 1 and out is None:
            raise ValueError(f"out: none given for {len(files)} files; a path for all is accepted")
        content = contents[0] if out is None else join(contents)
    if out is not None:
        from model.whole_file import write_json

        write_json(out, content)
    _show(content, out or files[0])


def _resolved(device: str | None) -> torch.device:
    from model.device import resolve_device

    return resolve_device(device)


def _default_numerics(device: torch.device) -> str:
    return "fp32" if device.type == "cpu" else "bf16"


def _echo_images(row: dict[str, Any]) -> None:
    outcome = (
        f"skipped: {row['skipped']}"
        if "skipped" in row
        else f"{row['images_per_s']:.3f} images/s, {row['step_ms']:.3f} ms a step, "
        f"decode {row['decode_s']:.3f} s"
    )
    typer.echo(f"images   {row['images']}x{row['side']} {row['provider']:10} {row['variant']:22} {outcome}")


def _echo_row(row: dict[str, Any]) -> None:
    size = f"{row['rows']}x{row['side']}"
    if "length" in row:
        size += f" L={row['length']} d={row['d_inner']}"
    outcome = (
        f"skipped: {row['skipped']}"
        if "skipped" in row
        else f"{row['ms']:.3f} ms ({row['ms_p20']:.3f} to {row['ms_p80']:.3f})"
    )
    typer.echo(f"{row['scope']:8} {size:22} {row['provider']:10} {row['variant']:32} {outcome}")


def _show(content: dict[str, Any], path: Path) -> None:
    from rich.console import Console

    from model.benchmark.plot import can_plot, plot_forwards
    from model.benchmark.summary import fits, forward_table

    Console(width=max(_TABLE_WIDTH, Console().width)).print(forward_table(content["results"]))
    for fit in fits(content["results"]):
        typer.echo(
            f"{fit['provider']:8} {fit['rows']!s:>5} rows: time of a row grows as L^{fit['exponent']:.2f}, "
            f"its multiply-adds as L^{fit['macs_exponent']:.2f}"
        )
    typer.echo(str(path))
    if can_plot():
        typer.echo(str(plot_forwards(content, path.with_suffix(".png"))))
    else:
        typer.echo(f"no plot without matplotlib (extra `bench`): `lamamba bench report {path}` draws it")
