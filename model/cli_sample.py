"""`lamamba sample`: images from a model folder, without a server.

Image j of a command is the image j of the HTTP request with the same seed and settings.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from model.limits import DEFAULT_STEPS, GUIDANCE_SCALE_RANGE, MAX_SEED
from model.messages import one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.images import ImageFormat
    from model.pipeline import LaMambaPipeline

__all__ = ["SAMPLE_EXAMPLES", "sample"]

SAMPLE_EXAMPLES = (
    'Examples:  lamamba sample --class "venice square" --num 16 --out grid.png   |   '
    "lamamba sample --class 3 --sampler ddpm --steps 250 --out folder   |   "
    "lamamba sample --num 210 --resolution 256 --out samples.npz"
)

_FORMAT_OF_SUFFIX = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_QUALITY = 95


def sample(
    out: Annotated[
        Path, typer.Option(help="A picture (.png .jpg .webp; a grid if several), .npz, or a folder of PNGs.")
    ] = Path("sample.png"),
    class_id: Annotated[
        str | None, typer.Option("--class", help="Label or id of the class; by default all classes in turn.")
    ] = None,
    num: Annotated[int, typer.Option(help="Images to make.")] = 1,
    cfg_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance, 1 to 20; by default the model's own.")
    ] = None,
    guidance_interval: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Least and greatest timestep with guidance, of 0 (clean) to 999 (noise); by default all."
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpm++.")] = "dpm++",
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; by default 250 for ddpm, 50 for ddim, 20 for dpm++.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the images; by default drawn and reported.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels a side: which shipped model, 128 (default) or 256.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model folder or hub id instead.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images denoised at once.")] = 16,
    columns: Annotated[int | None, typer.Option(help="Columns of a grid; by default near to square.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")] = None,
    scan_backend: Annotated[
        str, typer.Option(help="auto, reference, vectorized, mamba_cuda, triton.")
    ] = "auto",
) -> None:
    """Make images of a class: one picture, a grid, a folder, or an array."""
    from model.usage import usage_errors

    with usage_errors():
        _check_numbers(num=num, batch_size=batch_size, columns=columns, seed=seed, cfg_scale=cfg_scale)
        write = _writer(out, num, columns)
        if sampler not in DEFAULT_STEPS:
            raise ValueError(f"sampler: {sampler} given; accepted are {', '.join(DEFAULT_STEPS)}")
        pipeline = _load(model, resolution, device, scan_backend)
        plan = _plan(pipeline, class_id, num, cfg_scale, guidance_interval, sampler, steps, seed)
        write(plan, _make(pipeline, plan, batch_size))
    typer.echo(f"{out}: {num} of {pipeline.name}, seed {plan.seed}")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to make, with nothing left open."""

    pipeline: LaMambaPipeline
    class_labels: Sequence[int]
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    sampler: str
    num_inference_steps: int
    seed: int

    def metadata(self, image_index: int) -> dict[str, str]:
        """What the file of one image carries."""
        from model.images import image_metadata

        label = self.class_labels[image_index]
        return image_metadata(
            seed=self.seed,
            image_index=image_index,
            class_label=self.pipeline.labels[label] if self.pipeline.num_classes else None,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            num_inference_steps=self.num_inference_steps,
            sampler=self.sampler,
            model=self.pipeline.name,
            weights_hash=self.pipeline.weights_hash,
        )


_Images = Iterator["NDArray[np.uint8]"]
_Writer = Callable[[_Plan, _Images], None]


def _check_numbers(
    *, num: int, batch_size: int, columns: int | None, seed: int | None, cfg_scale: float | None
) -> None:
    for name, value in (("num", num), ("batch_size", batch_size), ("columns", columns)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} given; 1 or more is accepted")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: {seed} given; 0 to {MAX_SEED} is accepted")
    low, high = GUIDANCE_SCALE_RANGE
    if cfg_scale is not None and not low <= cfg_scale <= high:
        raise ValueError(f"cfg_scale: {cfg_scale:g} given; {low:g} to {high:g} is accepted")


def _load(
    model: str | None, resolution: int | None, device: str | None, scan_backend: str
) -> LaMambaPipeline:
    from model.cpu_rows import prepare_process
    from model.cpu_threads import available_cpu_threads
    from model.pipeline import LaMambaPipeline
    from model.pretrained import default_model_dir

    prepare_process()
    folder = model if model is not None else default_model_dir(resolution or 128)
    try:
        pipeline = LaMambaPipeline.load(
            folder, device=device, scan_backend=scan_backend, num_row_threads=available_cpu_threads()
        )
    except (RuntimeError, OSError) as error:  # a device that has not the room, for one
        raise ValueError(one_line(error)) from error
    if resolution not in (None, pipeline.resolution):
        raise ValueError(f"resolution: {resolution} given; {pipeline.name} makes {pipeline.resolution}")
    return pipeline


def _plan(
    pipeline: LaMambaPipeline,
    class_id: str | None,
    num: int,
    cfg_scale: float | None,
    guidance_interval: tuple[int, int] | None,
    sampler: str,
    steps: int | None,
    seed: int | None,
) -> _Plan:
    from model.diffusion.guidance import check_guidance_interval

    max_steps = pipeline.schedule.num_timesteps
    steps = DEFAULT_STEPS[sampler] if steps is None else steps
    if not 1 <= steps <= max_steps:
        raise ValueError(f"steps: {steps} given; {pipeline.name} accepts 1 to {max_steps}")
    if guidance_interval is not None:
        check_guidance_interval(guidance_interval, max_steps)
    if not pipeline.num_classes:
        if class_id is not None or cfg_scale not in (None, 1.0) or guidance_interval is not None:
            raise ValueError(
                f"class, cfg_scale, guidance_interval: given; {pipeline.name} has no classes "
                "and accepts none of them"
            )
        labels = [pipeline.null_label] * num
    elif class_id is not None:
        labels = [pipeline.class_index(class_id)] * num
    else:
        labels = [index % pipeline.num_classes for index in range(num)]
    default_scale = pipeline.default_guidance_scale if pipeline.num_classes else 1.0
    return _Plan(
        pipeline=pipeline,
        class_labels=labels,
        guidance_scale=default_scale if cfg_scale is None else cfg_scale,
        guidance_interval=guidance_interval,
        sampler=sampler,
        num_inference_steps=steps,
        seed=secrets.randbelow(2**32) if seed is None else seed,
    )


def _make(pipeline: LaMambaPipeline, plan: _Plan, batch_size: int) -> _Images:
    """The images one by one, (height, width, 3) uint8, under a progress bar of denoising steps."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    num = len(plan.class_labels)
    with Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("denoising steps", total=num * plan.num_inference_steps)
        for start in range(0, num, batch_size):
            part = range(start, min(start + batch_size, num))
            pixels = pipeline.generate(
                [plan.class_labels[index] for index in part],
                seeds=[plan.seed] * len(part),
                image_indices=list(part),
                guidance_scale=plan.guidance_scale,
                guidance_interval=plan.guidance_interval,
                num_inference_steps=plan.num_inference_steps,
                sampler=plan.sampler,
                batch_size=batch_size,
                progress=lambda steps: progress.advance(task, steps),
            )
            yield from pixels.numpy()


def _writer(out: Path, num: int, columns: int | None) -> _Writer:
    """How `out` is written, decided before any work. Raises ValueError where it cannot be."""
    suffix = out.suffix.lower()
    if suffix in _FORMAT_OF_SUFFIX:
        format = cast("ImageFormat", _FORMAT_OF_SUFFIX[suffix])
        _make_folder(out.parent)
        return lambda plan, images: _write_picture(out, format, columns, plan, images)
    if suffix == ".npz":
        _make_folder(out.parent)
        return lambda plan, images: _write_array(out, plan, images)
    if suffix and not out.is_dir():
        accepted = ", ".join([*_FORMAT_OF_SUFFIX, ".npz"])
        raise ValueError(f"out: {out} given; {accepted} or a folder is accepted")
    _make_folder(out)
    digits = max(5, math.ceil(math.log10(num + 1)))
    return lambda plan, images: _write_folder(out, digits, plan, images)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {folder} is no folder and cannot be made ({error.strerror})") from error


def _write_picture(out: Path, format: ImageFormat, columns: int | None, plan: _Plan, images: _Images) -> None:
    from model.images import encode_image, image_grid

    metadata = plan.metadata(0)
    if len(plan.class_labels) > 1:
        metadata |= {"num_images": str(len(plan.class_labels))}
        if len(set(plan.class_labels)) > 1:
            metadata["class"] = "all in turn"
    out.write_bytes(encode_image(image_grid(list(images), columns), format, _QUALITY, metadata))


def _write_array(out: Path, plan: _Plan, images: _Images) -> None:
    """`arr_0` as the usual evaluation scripts read it, with what made each image beside it."""
    import numpy as np

    pixels = np.stack(list(images))  # (n, height, width, 3)
    np.savez(
        out,
        arr_0=pixels,
        class_labels=np.asarray(plan.class_labels),
        seeds=np.full(len(pixels), plan.seed),
        image_indices=np.arange(len(pixels)),
    )


def _write_folder(out: Path, digits: int, plan: _Plan, images: _Images) -> None:
    from model.images import encode_image

    for index, image in enumerate(images):
        encoded = encode_image(image, "png", _QUALITY, plan.metadata(index))
        (out / f"{index:0{digits}d}.png").write_bytes(encoded)
