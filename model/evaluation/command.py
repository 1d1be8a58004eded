"""The command `lamamba evaluate`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.usage import usage_errors

if TYPE_CHECKING:
    from model.evaluation.config import EvaluationConfig
    from model.evaluation.ranks import Ranks
    from model.evaluation.sources import ImageSet

__all__ = ["EVALUATE_EXAMPLES", "evaluate_command"]

EVALUATE_EXAMPLES = (
    "Examples:  lamamba evaluate --model model/pretrained/places-128 --output-dir OUT   |   "
    "torchrun --nproc-per-node 8 -m model.cli evaluate --model DIR --output-dir OUT --num-images 50000 "
    "--sampler ddpm --reference VIRTUAL_imagenet256_labeled.npz "
    "--extractor inception=weights-inception-2015-12-05-6726825d.pth   |   "
    "lamamba evaluate --samples OUT/samples-cfg1.npz --output-dir OTHER --reference FOLDER "
    "--extractor dinov2=dinov2-large"
)

_PLACES = "places"
_CUDA_MICRO_BATCH_PIXELS = 2**23  # thousands of images: larger micro-batches than a server's keep a GPU busy
_ROWS = {"cuda": 1024, "cpu": 32}


def evaluate_command(
    output_dir: Annotated[Path, typer.Option(help="Where evaluation.json, samples and pictures go.")],
    model: Annotated[str | None, typer.Option(help="A model folder or hub id, to make images of.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Images that are there instead: an .npz with arr_0, as ADM writes it.")
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="What samples are compared with: places, an .npz (ADM's VIRTUAL_*.npz with statistics), "
            "or a folder of pictures, cut to squares as ADM does."
        ),
    ] = _PLACES,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="Features to measure on, may be repeated: inception=FILE (torch-fidelity's weights; its "
            "distance alone is FID), dinov2=FOLDER, judge=FILE, or efficientnet-lite2, the default."
        ),
    ] = None,
    # Under torchrun, whose own parser takes --num for two options of its own, only the longer name works.
    num: Annotated[
        int,
        typer.Option("--num-images", "--num", help="Images to make at each scale; papers take 50000."),
    ] = 5000,
    guidance_scales: Annotated[
        str | None,
        typer.Option(help="Scales, comma-separated, 1 is off; by default 1,1.5,2,2.5,3,4 on places, else 1."),
    ] = None,
    guidance_interval: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Least and greatest timestep with guidance, 0 is clean; by default all."),
    ] = None,
    distance_scales: Annotated[
        str | None, typer.Option(help="Scales at which distances are measured; by default all.")
    ] = None,
    num_per_scale: Annotated[
        int | None, typer.Option(help="Images at the scales without a distance; by default --num.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; by default 250 for ddpm, 50 for ddim, 20 for dpm++.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpm++.")] = "dpm++",
    classes: Annotated[
        str, typer.Option(help="balanced (all equally often) or random (drawn for each image).")
    ] = "balanced",
    seed: Annotated[int, typer.Option(help="Image i is made from (seed, i); also the judge's seed.")] = 0,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="Stop once the samples are there.")
    ] = False,
    judge: Annotated[
        Path | None,
        typer.Option(help="judge.safetensors of an earlier evaluation; by default one is trained."),
    ] = None,
    judge_views: Annotated[int, typer.Option(help="Views that the judge is trained on.")] = 200_000,
    training_views: Annotated[
        int, typer.Option(help="Training views searched for the nearest to samples.")
    ] = 20_000,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Network rows in a batch; guidance takes two an image. By default 1024 on CUDA, 32 on a CPU."
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the networks first.")] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there, under torchrun a card a rank."),
    ] = None,
) -> None:
    """Make images of a model and measure them: FID and its kin, and on places all that can be known.

    The same command goes on after an interruption. Under torchrun the ranks share the work.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with usage_errors():
        if (model is None) == (samples is None):
            raise ValueError("model, samples: exactly one of the two is accepted")
        if samples is not None and reference == _PLACES:
            raise ValueError("reference: places given; with samples an .npz or a folder is accepted")
        if samples is not None and generate_only:
            raise ValueError("generate_only: given with samples; with a model it is accepted")
        if judge is not None and (samples is not None or reference != _PLACES or generate_only):
            raise ValueError(
                f"judge: {judge} given; it is accepted where a model's images are compared with places"
            )
        if guidance_scales is None:
            guidance_scales = "1,1.5,2,2.5,3,4" if reference == _PLACES else "1"
        from model.limits import DEFAULT_STEPS

        fields: dict[str, Any] = {
            "num": num,
            "guidance_scales": _scales("guidance_scales", guidance_scales),
            "guidance_interval": guidance_interval,
            "distance_scales": None
            if distance_scales is None
            else _scales("distance_scales", distance_scales),
            "num_per_scale": num_per_scale,
            "num_inference_steps": DEFAULT_STEPS.get(sampler, 1) if steps is None else steps,
            "sampler": sampler,
            "classes": classes,
            "seed": seed,
            "compile": compile,
            "judge_views": judge_views,
            "num_training_views": training_views,
        }
        from model.evaluation.config import EvaluationConfig
        from model.evaluation.ranks import Ranks

        with Ranks.joined() as ranks:
            place = ranks.device(device)
            fields["num_rows"] = _ROWS[place.type] if rows is None else rows
            config = EvaluationConfig(**fields)
            if not ranks.is_main:
                logging.getLogger().setLevel(logging.ERROR)
            names = extractor or ["efficientnet-lite2"]
            if samples is not None:
                seconds = _evaluate_file(samples, reference, names, output_dir, place, ranks)
            else:
                given = None if generate_only else reference
                seconds = _evaluate_model(str(model), given, names, output_dir, judge, config, place, ranks)
            if ranks.is_main:
                typer.echo(f"{output_dir / 'evaluation.json'}: {sum(seconds.values()):.0f} s")


def _evaluate_file(
    samples: Path, reference: str, extractors: list[str], output_dir: Path, device: Any, ranks: Ranks
) -> dict[str, float]:
    from model.evaluation.evaluation import evaluate_file
    from model.evaluation.features import load_extractor
    from model.evaluation.sources import NpzImages

    images = NpzImages(samples)
    report = evaluate_file(
        images,
        _reference_images(reference, images.size),
        extractors=[load_extractor(name, device) for name in extractors],
        output_dir=output_dir,
        ranks=ranks,
    )
    return dict(report["seconds"])


def _evaluate_model(
    model: str,
    reference: str | None,
    extractors: list[str],
    output_dir: Path,
    judge: Path | None,
    config: EvaluationConfig,
    device: Any,
    ranks: Ranks,
) -> dict[str, float]:
    """`reference` None: only the samples are made."""
    from model.data.places import Places
    from model.evaluation.evaluation import Evaluation
    from model.evaluation.features import load_extractor
    from model.pipeline import LaMambaPipeline

    loaded = [] if reference is None else [load_extractor(name, device) for name in extractors]
    pipeline = LaMambaPipeline.load(model, device=device)
    if pipeline.device.type == "cuda":
        pipeline.autoencoder.micro_batch_pixels = _CUDA_MICRO_BATCH_PIXELS
    images = None
    if reference not in (None, _PLACES):
        images = _reference_images(reference, pipeline.resolution)
    evaluation = Evaluation(
        pipeline,
        config,
        extractors=loaded,
        output_dir=output_dir,
        reference=images,
        places=Places.load(device=device) if reference == _PLACES else None,
        judge_file=judge,
        ranks=ranks,
    )
    return dict(evaluation.run()["seconds"])


def _reference_images(reference: str, size: int) -> ImageSet:
    """The images called `reference` on the command line, at `size` pixels a side."""
    from model.evaluation.sources import FolderImages, NpzImages

    path = Path(reference).expanduser()
    if path.is_dir():
        return FolderImages(path, size)
    if not path.is_file():
        raise ValueError(f"reference: {reference} given; places, an .npz or a folder of pictures is accepted")
    images = NpzImages(path)
    if images.size != size:
        raise ValueError(
            f"reference: {reference} has images of {images.size} px; {size} px are accepted here"
        )
    return images


def _scales(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} given; numbers with commas between are accepted") from error
