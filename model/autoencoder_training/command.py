"""`lamamba train-autoencoder`: an f8 autoencoder of one's own on views of `places`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from model.usage import usage_errors

__all__ = ["AUTOENCODER_EXAMPLES", "train_autoencoder_command"]

AUTOENCODER_EXAMPLES = (
    "Examples:  lamamba train-autoencoder --output-dir runs/places-autoencoder   |   "
    "lamamba train-autoencoder --output-dir runs/second --max-seconds 388 "
    "--set initial_weights=runs/places-autoencoder/vae --set train_encoder=false"
)


def train_autoencoder_command(
    output_dir: Annotated[
        Path, typer.Option(help="Folder of the run; one that holds a run is gone on with.")
    ],
    max_seconds: Annotated[float, typer.Option(help="Training time.")] = 450.0,
    max_images: Annotated[int | None, typer.Option(help="End after so many images instead.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")] = None,
    compile: Annotated[bool, typer.Option(help="torch.compile of the step.")] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field of the config, NAME=VALUE; repeatable.")
    ] = None,
) -> None:
    """Train the autoencoder of the shipped models on views of places; the same command resumes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with usage_errors():
        from model.autoencoder_training.config import AutoencoderTrainingConfig, parse_settings
        from model.autoencoder_training.run import train

        budget = {"max_seconds": max_seconds, "max_images": max_images, "compile": compile}
        config = AutoencoderTrainingConfig(**(budget | parse_settings(settings or [])))
        try:
            train(config, output_dir, device)
        except FloatingPointError as error:
            typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error
    vae = output_dir / "vae"
    typer.echo(f"{vae}: ready for `lamamba train --config places-256 autoencoder={vae}`")
