"""Images of a model, by the ten thousands, straight into an .npz as ADM's evaluation reads it.

    OUT/samples-cfg1.5.json     what the images are made from, written first
    OUT/samples-cfg1.5.parts/   one .npy for so many images, whole or not at all; gone at the end
    OUT/samples-cfg1.5.npz      `arr_0` (n, size, size, 3) uint8; `arr_1` (n,) int64, labels, if any

Image i is made from (seed, i): any rank may make any part, and whoever comes back after an interruption makes
the parts that are missing. Another batch size, or another kind of device, rounds differently: images then
differ by a level here and there. What was begun with other settings is refused, not mixed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from model.diffusion.noise import philox_uniform
from model.evaluation.archive import Parts, write_archive
from model.evaluation.features import HASH_DIGITS
from model.evaluation.ranks import Ranks
from model.evaluation.sources import NpzImages
from model.pipeline import LaMambaPipeline
from model.whole_file import whole_file, write_json

__all__ = ["CLASSES", "SampleFile", "SamplePlan", "require_disk_space"]

CLASSES = ("balanced", "random")
_LEAST_PART = 32  # images: a part is one batch, or several small ones
_CLASS_DRAW = 2**32 - 1  # of (seed, image): the noise has the draws from 0 on
_PART_FIELD = "images_per_part"


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """What images to make of a model."""

    num: int
    classes: str
    """balanced: image i shows class i modulo their number; random: drawn for each image."""
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    sampler: str
    num_inference_steps: int
    seed: int

    def class_labels(self, images: range, pipeline: LaMambaPipeline) -> list[int]:
        """Of the images with these numbers, each a function of its number and the seed alone."""
        if not pipeline.num_classes:
            return [pipeline.null_label] * len(images)
        if self.classes == "balanced":
            return [i % pipeline.num_classes for i in images]
        numbers = torch.arange(images.start, images.stop)
        seeds, draws = torch.full_like(numbers, self.seed), torch.full_like(numbers, _CLASS_DRAW)
        return (philox_uniform(seeds, numbers, draws, 1)[:, 0] * pipeline.num_classes).long().tolist()


class SampleFile:
    """The .npz of one plan's images in a folder, made already or still to be made."""

    def __init__(self, folder: Path, plan: SamplePlan, pipeline: LaMambaPipeline) -> None:
        self.plan, self.pipeline = plan, pipeline
        self.path = folder / f"samples-cfg{plan.guidance_scale:g}.npz"
        self._parts = self.path.with_suffix(".parts")

    @property
    def record(self) -> dict[str, Any]:
        """All that the images depend on."""
        pipeline = self.pipeline
        return {
            "weights": pipeline.weights_hash,
            "autoencoder": pipeline.autoencoder.weights_hash[:HASH_DIGITS],  # as loaded, in `dtype`
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "resolution": pipeline.resolution,
            **json.loads(json.dumps(dataclasses.asdict(self.plan))),
        }

    @property
    def num_bytes(self) -> int:
        """What the images take on the disk, at the end."""
        return self.plan.num * math.prod(self._shape)

    @property
    def is_made(self) -> bool:
        return self.path.is_file()

    def check(self) -> None:
        """ValueError where the folder holds images of another plan under this one's name."""
        begun = self._begun()
        if begun is None and (self.is_made or self._parts.is_dir()):
            raise ValueError(
                f"output_dir: {self.path.with_suffix('.json')} is missing beside the images that it "
                "describes; an empty folder is accepted"
            )
        for field, value in self.record.items():
            if begun is not None and begun.get(field) != value:
                raise ValueError(
                    f"output_dir: {self.path.with_suffix('')} was begun with {field} {begun.get(field)}, "
                    f"{value} given; the same settings or another folder are accepted"
                )

    def make(
        self, *, ranks: Ranks, batch_size: int, fixed_shapes: bool, progress: Progress | None
    ) -> NpzImages:
        """Make what is missing, together with the other ranks.

        Args:
            batch_size: images denoised at once.
            fixed_shapes: fill each batch up with images that are thrown away, so that a compiled network sees
                one shape alone.
        """
        images_per_part, missing = ranks.from_main(lambda: self._begin(batch_size, ranks.size))
        own = missing[ranks.rank :: ranks.size]
        parts = [self._images_of(part, images_per_part) for part in own]
        where = "" if ranks.size == 1 else f", rank {ranks.rank} of {ranks.size}"
        advance = _advance(
            progress,
            f"sampling at guidance {self.plan.guidance_scale:g}{where}",
            total=sum(map(len, parts)) * self.plan.num_inference_steps,
        )
        for part, images in zip(own, parts, strict=True):
            pixels = np.concatenate(list(self._made(images, batch_size, fixed_shapes, advance)))
            with whole_file(self._part_file(part)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels)
        ranks.wait()
        ranks.from_main(lambda: self._finish(images_per_part))
        return NpzImages(self.path)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.pipeline.resolution, self.pipeline.resolution, 3

    def _begun(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def _begin(self, batch_size: int, num_ranks: int) -> tuple[int, list[int]]:
        """Images in a part and the parts that are missing."""
        self.check()
        least = min(_LEAST_PART, -(-self.plan.num // num_ranks))
        begun = self._begun() or self.record | {_PART_FIELD: batch_size * max(1, least // batch_size)}
        write_json(self.path.with_suffix(".json"), begun)
        images_per_part = int(begun[_PART_FIELD])
        if self.is_made:
            return images_per_part, []
        self._parts.mkdir(exist_ok=True)
        parts = range(-(-self.plan.num // images_per_part))
        return images_per_part, [part for part in parts if not self._part_file(part).is_file()]

    def _finish(self, images_per_part: int) -> None:
        """Put the parts together."""
        if not self.is_made:
            num_parts = -(-self.plan.num // images_per_part)
            arrays: dict[str, Parts] = {
                "arr_0": ((self.plan.num, *self._shape), np.dtype(np.uint8), self._read(range(num_parts)))
            }
            if self.pipeline.num_classes:
                labels = np.array(self.plan.class_labels(range(self.plan.num), self.pipeline), np.int64)
                arrays["arr_1"] = (labels.shape, labels.dtype, [labels])
            write_archive(self.path, arrays)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _read(self, parts: range) -> Iterator[NDArray[np.uint8]]:
        for part in parts:
            path = self._part_file(part)
            if not path.is_file():
                raise ValueError(
                    f"output_dir: {path} is missing, though a rank has made it; a folder that all ranks "
                    "share is accepted"
                )
            yield np.load(path)

    def _made(
        self, images: range, batch_size: int, fixed_shapes: bool, advance: Callable[[int], None]
    ) -> Iterator[NDArray[np.uint8]]:
        """The images with these numbers, a batch at a time."""
        plan = self.plan
        for start in range(images.start, images.stop, batch_size):
            wanted = min(batch_size, images.stop - start)
            batch = range(start, start + (batch_size if fixed_shapes else wanted))
            pixels = self.pipeline.generate(
                plan.class_labels(batch, self.pipeline),
                seeds=[plan.seed] * len(batch),
                image_indices=batch,
                guidance_scale=plan.guidance_scale,
                guidance_interval=plan.guidance_interval,
                num_inference_steps=plan.num_inference_steps,
                sampler=plan.sampler,
                batch_size=batch_size,
                progress=advance,
            )
            yield pixels[:wanted].numpy()

    def _images_of(self, part: int, images_per_part: int) -> range:
        return range(part * images_per_part, min((part + 1) * images_per_part, self.plan.num))

    def _part_file(self, part: int) -> Path:
        return self._parts / f"part-{part:06d}.npy"


def require_disk_space(folder: Path, files: Sequence[SampleFile]) -> None:
    """ValueError where the disk of `folder` has no room for the files that are still to be made.

    The largest is there twice for a while, as parts and whole.
    """
    missing = [file.num_bytes for file in files if not file.is_made]
    needed = sum(missing) + max(missing, default=0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"output_dir: {folder} has {free / 2**30:.1f} GiB free; {needed / 2**30:.1f} GiB are needed for "
            f"{sum(file.plan.num for file in files if not file.is_made):,} images"
        )


def _advance(progress: Progress | None, description: str, *, total: int) -> Callable[[int], None]:
    """A function that counts steps (images x denoising steps) as done on the display."""
    if progress is None:
        return lambda steps: None
    task = progress.add_task(description, total=total)
    return lambda steps: progress.advance(task, steps)
