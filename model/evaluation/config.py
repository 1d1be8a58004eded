"""What an evaluation measures and with how many images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.evaluation.manifold import NEIGHBOUR
from model.evaluation.samples import CLASSES, SamplePlan
from model.limits import DEFAULT_STEPS, MAX_IMAGE_INDEX, MAX_SEED

__all__ = ["PLACES_GUIDANCE_SCALES", "EvaluationConfig"]

PLACES_GUIDANCE_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""At which a model of places is looked at, where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of one evaluation. ValueError names a bad field, its value and what is accepted."""

    num: int = 5000
    """Images generated at each of `distance_scales`, and views of places that they are compared with."""
    guidance_scales: tuple[float, ...] = PLACES_GUIDANCE_SCALES
    """Guidance scales at which images are generated and judged; 1 is off."""
    guidance_interval: tuple[int, int] | None = None
    """The least and the greatest timestep with guidance; None is all."""
    distance_scales: tuple[float, ...] | None = None
    """Those of `guidance_scales` at which the distance is measured too; None is all of them."""
    num_per_scale: int | None = None
    """Images generated at the other scales; None is `num`."""
    num_inference_steps: int = 20
    sampler: str = "dpm++"
    """ddpm, ddim or dpm++."""
    seed: int = 0
    """Image i is made from (seed, i), at every scale."""
    classes: str = "balanced"
    """balanced: image i shows class i modulo the number of classes; random: drawn from (seed, i)."""
    num_rows: int = 1024
    """Network rows in a batch; an image with guidance takes two."""
    compile: bool = False
    """torch.compile of the networks: minutes at the start, with and without guidance, then faster steps."""
    judge_views: int = 200_000
    """Real views that the judge is trained on, where none is given."""
    num_training_views: int = 20_000
    """Training views among which the nearest to generated images are looked for."""
    images_per_class: int = 6
    """Columns of the picture of all classes."""

    def __post_init__(self) -> None:
        if self.sampler not in DEFAULT_STEPS:
            raise ValueError(f"sampler: {self.sampler} given; one of {', '.join(DEFAULT_STEPS)} is accepted")
        if self.classes not in CLASSES:
            raise ValueError(f"classes: {self.classes} given; one of {', '.join(CLASSES)} is accepted")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed: {self.seed} given; at most {MAX_SEED} is accepted")
        if self.num > MAX_IMAGE_INDEX:
            raise ValueError(f"num: {self.num} given; at most {MAX_IMAGE_INDEX} is accepted")
        minima = {"num": NEIGHBOUR + 1, "num_inference_steps": 1, "seed": 0, "num_rows": 2, "judge_views": 1}
        minima |= {"num_training_views": 1, "images_per_class": 1}
        if self.num_per_scale is not None:
            minima["num_per_scale"] = 1
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}: {getattr(self, name)} given; at least {minimum} is accepted")
        scales = self.guidance_scales
        if not scales or len(set(scales)) < len(scales) or not all(1 <= s < math.inf for s in scales):
            raise ValueError(
                f"guidance_scales: {list(scales)} given; different numbers of at least 1 are accepted"
            )
        for scale in self.distance_scales or ():
            if scale not in scales:
                raise ValueError(
                    f"distance_scales: {scale:g} given; those of guidance_scales are accepted: "
                    + ", ".join(f"{s:g}" for s in scales)
                )

    def measures_distance(self, guidance_scale: float) -> bool:
        return self.distance_scales is None or guidance_scale in self.distance_scales

    def num_images(self, guidance_scale: float) -> int:
        """How many images are generated at this scale."""
        if self.num_per_scale is None or self.measures_distance(guidance_scale):
            return self.num
        return self.num_per_scale

    def batch_size(self, guidance_scale: float) -> int:
        """Images denoised at once."""
        return max(1, self.num_rows // 2 if guidance_scale != 1 else self.num_rows)

    def sample_plan(self, guidance_scale: float) -> SamplePlan:
        """The images of one scale."""
        return SamplePlan(
            num=self.num_images(guidance_scale),
            classes=self.classes,
            guidance_scale=guidance_scale,
            guidance_interval=self.guidance_interval,
            sampler=self.sampler,
            num_inference_steps=self.num_inference_steps,
            seed=self.seed,
        )
