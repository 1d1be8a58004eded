"""The commands of `model/`: prepare-latents, train, export, sample, evaluate, convert, info, bench and more.

`lamamba` itself adds serve.
`python -m model.cli` runs them where the service's packages are not installed.
Commands import what they need when they run, so that `--help` and mistakes in arguments answer at once.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from model.autoencoder_training.command import AUTOENCODER_EXAMPLES, train_autoencoder_command
from model.benchmark.command import bench_app
from model.cli_prepare import PREPARE_EXAMPLES, prepare_latents_command
from model.cli_sample import SAMPLE_EXAMPLES, sample
from model.evaluation.command import EVALUATE_EXAMPLES, evaluate_command
from model.launched import launched_rank
from model.usage import usage_errors

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, sample, convert and inspect LaMamba-Diff models.",
)

app.command(epilog=SAMPLE_EXAMPLES)(sample)
app.command("prepare-latents", epilog=PREPARE_EXAMPLES)(prepare_latents_command)
app.command("train-autoencoder", epilog=AUTOENCODER_EXAMPLES)(train_autoencoder_command)
app.command("evaluate", epilog=EVALUATE_EXAMPLES)(evaluate_command)
app.add_typer(bench_app, name="bench")


@app.command(
    epilog="Examples:  lamamba train --config places-128   |   "
    "lamamba train --config my.yaml learning_rate=1e-4 network.hidden_size=64   |   lamamba train --list"
)
def train(
    config: Annotated[
        str | None, typer.Option(help="A recipe's name, of those that --list shows, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to replace, as key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")] = None,
    show_recipes: Annotated[bool, typer.Option("--list", help="List the recipes and end.")] = False,
) -> None:
    """Train a network on latents; the same command resumes an interrupted run.

    Several processes share a run: torchrun --nproc-per-node 8 -m model.cli train --config ...
    """
    from model.recipes import load_recipe, recipe_summaries

    if show_recipes:
        recipes: list[dict[str, object]] = [
            {"recipe": name, "what it trains": summary} for name, summary in recipe_summaries().items()
        ]
        typer.echo(_table(recipes))
        return
    with usage_errors():
        main = launched_rank() == 0  # of torchrun's processes, the one that speaks
    logging.basicConfig(
        level=logging.INFO if main else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    with usage_errors(quiet=not main):
        if config is None:
            raise ValueError("config: none given; a recipe's name, of those that --list shows, is accepted")
        fields = load_recipe(config, overrides)
        from model.training.config import TrainConfig

        configuration = TrainConfig.from_dict(fields)
        from model.training.run import Diverged
        from model.training.run import train as run
        from model.training.world import RankLost

        try:
            folder = run(configuration, device=device)
        except (Diverged, RankLost) as error:
            typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error
    if not main:
        return
    if folder is None:
        typer.echo("stopped in time; the same command goes on")
    else:
        typer.echo(f"{folder}: ready for `lamamba serve --models {folder}`")


@app.command(
    epilog="Examples:  lamamba export runs/places-256 models/places   |   "
    "lamamba export runs/xl models/xl --sigma-rel 0.08 --metrics evaluation/xl/evaluation.json"
)
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder: its output_dir.")],
    target: Annotated[Path, typer.Argument(help="The model folder to write.")],
    images: Annotated[
        int | None, typer.Option(help="Images of the state, or snapshot; by default the newest.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema, or network for the weights themselves.")] = "ema",
    sigma_rel: Annotated[
        float | None,
        typer.Option(help="Length of the average instead: one of ema_tracks, or any that snapshots make up."),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(help="Figures for the model card: an evaluation.json, or another JSON object."),
    ] = None,
) -> None:
    """Write a training run's weights as the folder that the server loads, with a model card."""
    with usage_errors():
        from model.training.export import export_run, read_metrics

        figures = None if metrics is None else read_metrics(metrics)
        taken = export_run(
            run, target, images_seen=images, weights=weights, sigma_rel=sigma_rel, metrics=figures
        )
    typer.echo(f"{target}: the weights after {taken:,} images, ready for `lamamba serve --models {target}`")


@app.command(
    epilog="Examples:  lamamba convert 0400000.pt models/xl --vae sd-vae-ft-mse --labels imagenet.json   |   "
    "lamamba convert --reverse models/xl xl.pt"
)
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint of the authors' code; --reverse: a model folder.")
    ],
    target: Annotated[Path, typer.Argument(help="The model folder to write; --reverse: the checkpoint.")],
    vae: Annotated[
        Path | None, typer.Option(help="An AutoencoderKL's folder to put beside the network.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class labels: JSON list or object, or text lines.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="ema or model; by default ema if there.")] = None,
    vssm: Annotated[
        str | None, typer.Option(help="ss2d_continuous or ss2d, where the checkpoint does not say.")
    ] = None,
    attention: Annotated[
        str, typer.Option(help="shifted_window, or none for a network trained without attention.")
    ] = "shifted_window",
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Write a checkpoint of the authors' code.")
    ] = False,
) -> None:
    """Turn a checkpoint of the authors' code into a model folder, or back."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with usage_errors():
        _require_one_of("weights", weights, (None, "ema", "model"))
        _require_one_of("vssm", vssm, (None, "ss2d_continuous", "ss2d"))
        _require_one_of("attention", attention, ("shifted_window", "none"))
        from model.convert import convert_checkpoint, export_checkpoint

        if reverse:
            export_checkpoint(source, target)
            typer.echo(f"{target}: written")
            return
        report = convert_checkpoint(
            source,
            target,
            vae=vae,
            labels=labels,
            weights=cast("Any", weights),
            vssm=cast("Any", vssm),
            attention=cast("Any", attention),
        )
    typer.echo(f"{target}: {report.num_parameters:,} parameters from {report.weights!r}")
    for part in report.missing:
        typer.echo(f"{part}/ is missing: give --{part}, or copy one there before serving", err=True)


@app.command("add-guidance", epilog="Example:  lamamba add-guidance models/xl runs/lamamba-s-256/model")
def add_guidance(
    folder: Annotated[Path, typer.Argument(help="The model folder, which gets a guidance network.")],
    source: Annotated[Path, typer.Argument(help="The model folder of a smaller or less trained network.")],
) -> None:
    """Have guidance of a model step away from a second, worse network (autoguidance)."""
    with usage_errors():
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such model folder")
        from model.model_folder import add_guidance_network

        add_guidance_network(folder, source)
    typer.echo(f"{folder}: guided by {source}")


@app.command("fit-previews", epilog="Example:  lamamba fit-previews models/xl --num 64")
def fit_previews(
    folder: Annotated[Path, typer.Argument(help="The model folder, which gets a preview.json.")],
    num: Annotated[int, typer.Option(help="Images that are made to fit the map to.")] = 42,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")] = None,
) -> None:
    """Fit the map that shows unfinished images of a model while it denoises."""
    with usage_errors():
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such model folder")
        from model.cpu_rows import prepare_process
        from model.cpu_threads import available_cpu_threads
        from model.fit_previews import fit_model_previews
        from model.pipeline import LaMambaPipeline
        from model.preview import PREVIEW_FILE, write_preview_map

        prepare_process()
        pipeline = LaMambaPipeline.load(folder, device=device, num_row_threads=available_cpu_threads())
        preview_map, explained = fit_model_previews(pipeline, num_images=num)
        write_preview_map(folder, preview_map)
    typer.echo(f"{folder / PREVIEW_FILE}: explains {explained:.1%} of the variance of {num} images")


@app.command(
    epilog="Examples:  lamamba info --preset XL --resolution 512   |   lamamba info --model DIR --json   |   "
    "lamamba info --paper"
)
def info(
    preset: Annotated[str, typer.Option(help="S, B, L or XL.")] = "XL",
    resolution: Annotated[int, typer.Option(help="Pixels a side, under an f8 autoencoder.")] = 256,
    d_state: Annotated[int, typer.Option(help="N, the SSM's state size.")] = 1,
    model: Annotated[Path | None, typer.Option(help="A model folder instead of a preset.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="All networks of the paper.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the parameters and multiply-adds of a network, beside the paper's figures."""
    with usage_errors():
        if not 32 <= resolution <= 65536 or resolution % 32:
            raise ValueError(
                f"resolution: {resolution} given; a multiple of 32 pixels up to 65536 is accepted"
            )
        from model.architecture import Architecture, saved_architecture
        from model.config import LaMambaConfig
        from model.network.kinds import describe_network, published_sizes

        config: Architecture

        if paper:
            rows = published_sizes()
            typer.echo(json.dumps(rows, indent=2) if as_json else _table(rows))
            return
        if model is not None:
            try:
                fields = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
            except (OSError, json.JSONDecodeError) as error:
                raise ValueError(f"model: {model} is not a model folder ({error})") from error
            config = saved_architecture(fields)
        else:
            config = LaMambaConfig.preset(preset, sample_size=resolution // 8, d_state=d_state)
        description = describe_network(config)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        published = description.pop("paper") or {}
        typer.echo(_table([description | {f"paper_{key}": value for key, value in published.items()}]))


def _require_one_of(field: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    if value not in accepted:
        names = ", ".join(name for name in accepted if name)
        raise ValueError(f"{field}: {value!r} given; one of {names} is accepted")


def _table(rows: list[dict[str, object]]) -> str:
    """Rows of one shape as an aligned text table; nested values are left to --json."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in [columns, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    app()
