"""The command `lamamba evaluate`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from model.usage import usage_errors

__all__ = ["EVALUATE_EXAMPLES", "evaluate_command"]

EVALUATE_EXAMPLES = (
    "Examples:  lamamba evaluate --model model/pretrained/places-128 --output-dir evaluation   |   "
    "lamamba evaluate --model DIR --output-dir OUT --num 500 --guidance-scales 1,2"
)

_CUDA_MICRO_BATCH_PIXELS = 2**23  # thousands of images: larger micro-batches than a server's keep a GPU busy


def evaluate_command(
    model: Annotated[str, typer.Option(help="A model folder or hub id.")],
    output_dir: Annotated[Path, typer.Option(help="Where evaluation.json and the pictures go.")],
    num: Annotated[int, typer.Option(help="Images on each side of a distance.")] = 5000,
    guidance_scales: Annotated[
        str, typer.Option(help="Scales, comma-separated; 1 is off.")
    ] = "1,1.5,2,2.5,3,4",
    distance_scales: Annotated[
        str | None, typer.Option(help="Scales at which the distance is measured; by default all.")
    ] = None,
    num_per_scale: Annotated[
        int | None, typer.Option(help="Images at the scales without a distance; by default --num.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpm++.")] = "dpm++",
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the judge.")] = 0,
    judge: Annotated[
        Path | None,
        typer.Option(help="judge.safetensors of an earlier evaluation; by default one is trained."),
    ] = None,
    judge_views: Annotated[int, typer.Option(help="Views that the judge is trained on.")] = 200_000,
    training_views: Annotated[
        int, typer.Option(help="Training views searched for the nearest to samples.")
    ] = 20_000,
    rows: Annotated[int, typer.Option(help="Network rows in a batch; guidance takes two an image.")] = 1024,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")] = None,
) -> None:
    """Measure a model of places: distances to real views, class accuracy, nearest views, pictures."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with usage_errors():
        from model.evaluation.config import EvaluationConfig

        config = EvaluationConfig(
            num=num,
            guidance_scales=_scales("guidance_scales", guidance_scales),
            distance_scales=None if distance_scales is None else _scales("distance_scales", distance_scales),
            num_per_scale=num_per_scale,
            num_inference_steps=steps,
            sampler=sampler,
            seed=seed,
            num_rows=rows,
            compile=compile,
            judge_views=judge_views,
            num_training_views=training_views,
        )
        from model.data.places import Places
        from model.evaluate import Evaluation
        from model.evaluation.features import EfficientNetLite2
        from model.pipeline import LaMambaPipeline

        pipeline = LaMambaPipeline.load(model, device=device)
        if pipeline.device.type == "cuda":
            pipeline.autoencoder.micro_batch_pixels = _CUDA_MICRO_BATCH_PIXELS
        evaluation = Evaluation(
            pipeline,
            config,
            places=Places.load(device=pipeline.device),
            extractor=EfficientNetLite2(pipeline.device),
            output_dir=output_dir,
            judge_file=judge,
        )
        report = evaluation.run()
    typer.echo(f"{output_dir / 'evaluation.json'}: {sum(report['seconds'].values()):.0f} s")


def _scales(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} given; numbers with commas between are accepted") from error
