"""The models that this process serves, their limits, and the one place where a request's fields become work.

Limits have one home: the model folder gives classes, resolution and training steps; `model.limits` and the
settings give the rest. Validation, error messages and `/v1/models` read them here.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from model.diffusion.samplers import SAMPLERS
from model.images import IMAGE_FORMATS
from model.limits import DEFAULT_STEPS, GUIDANCE_SCALE_RANGE, MAX_IMAGE_INDEX, MAX_PREVIEWS, MAX_SEED
from service.engine.request import PRIORITIES, GenerationRequest, LaneName
from service.errors import InvalidField, NotFound, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.api.schemas import GenerateRequest
    from service.engine.pipeline import ServedPipeline
    from service.settings import Settings

__all__ = ["Catalog", "ModelFacts", "ServedModel"]

_RANDOM_SEEDS: Final = 2**32  # drawn seeds stay exact in every JSON reader and are short enough to type


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is said of a model in answers, which may be read long after the model has gone."""

    name: str
    resolution: int
    labels: tuple[str, ...]
    """Of its classes; empty for a model without."""
    weights_hash: str


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One loaded model and what it accepts."""

    pipeline: ServedPipeline
    max_images_per_request: int
    max_timeout_s: float
    default_timeout_s: float | None
    version: int = 1
    """Counts the loads of its name in this process."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, pipeline: ServedPipeline, settings: Settings, *, version: int = 1) -> ServedModel:
        """A model with the limits of the settings."""
        return cls(
            pipeline=pipeline,
            max_images_per_request=settings.max_images_per_request,
            max_timeout_s=settings.max_timeout_s,
            default_timeout_s=settings.default_timeout_s or None,
            version=version,
        )

    @property
    def name(self) -> str:
        """The model's id."""
        return self.pipeline.name

    @property
    def lane(self) -> LaneName:
        """What makes its images."""
        return LaneName(self.name, self.version)

    @property
    def facts(self) -> ModelFacts:
        """What is said of the model."""
        pipeline = self.pipeline
        return ModelFacts(
            name=pipeline.name,
            resolution=pipeline.resolution,
            labels=tuple(pipeline.labels),
            weights_hash=pipeline.weights_hash,
        )

    @property
    def max_steps(self) -> int:
        """Steps of the training process, which no sampler can exceed."""
        return self.pipeline.schedule.num_timesteps

    @property
    def conditional(self) -> bool:
        """Whether the model takes a class."""
        return self.pipeline.num_classes > 0

    @property
    def cfg_range(self) -> tuple[float, float]:
        """Least and greatest cfg_scale: without classes there is nothing to guide by."""
        return GUIDANCE_SCALE_RANGE if self.conditional else (1.0, 1.0)

    @property
    def default_cfg_scale(self) -> float:
        """cfg_scale of a request that gives none."""
        return self.pipeline.default_guidance_scale if self.conditional else 1.0

    @property
    def max_previews(self) -> int:
        """Most previews of an image: none without a preview map."""
        return MAX_PREVIEWS if self.pipeline.has_previews else 0

    def accepted(self) -> dict[str, str]:
        """What each field of a request may be, in words for messages."""
        low, high = self.cfg_range
        last = self.pipeline.num_classes - 1
        return {
            "class_id": f"a class id from 0 to {last} or its label" if self.conditional else "no class",
            "cfg_scale": f"{low:g} to {high:g}" if high > low else f"{low:g}",
            "guidance_interval": f"two timesteps from 0 to {self.max_steps - 1}, the lower one first"
            if self.conditional
            else "none, for it has no guidance",
            "resolution": str(self.pipeline.resolution),
            "num_images": f"1 to {self.max_images_per_request}",
            "steps": f"1 to {self.max_steps}",
            "sampler": _alternatives(SAMPLERS),
            "seed": f"0 to {MAX_SEED}",
            "image_index": f"0 to {MAX_IMAGE_INDEX}",
            "format": _alternatives(IMAGE_FORMATS),
            "quality": "1 to 100",
            "priority": _alternatives(PRIORITIES),
            "previews": f"0 to {MAX_PREVIEWS}"
            if self.max_previews
            else "0, for it has no preview map, which `lamamba fit-previews FOLDER` makes",
            "timeout_s": f"above 0 and up to {self.max_timeout_s:g} seconds",
        }

    def class_label(self, class_id: int | str | None) -> int:
        """The class that a request means.

        Raises InvalidField; for a text that is no label with those near it, whose search among a thousand
        takes up to 0.1 s.
        """
        if not self.conditional and class_id is None:
            return self.pipeline.null_label
        if not self.conditional or class_id is None:
            raise InvalidField("class_id", class_id, self.accepted()["class_id"])
        try:
            return self.pipeline.class_index(class_id)
        except ValueError as error:
            accepted = self.accepted()["class_id"]
            _, _, hint = str(error).partition("; the nearest of ")
            raise InvalidField(
                "class_id", class_id, f"{accepted}; the nearest of {hint}" if hint else accepted
            ) from error

    def describe(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it: OpenAI's fields, then ours."""
        pipeline = self.pipeline
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lamamba",
            "resolution": pipeline.resolution,
            "num_classes": pipeline.num_classes,
            "labels": list(pipeline.labels),
            "device": str(pipeline.device),
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "scan_backend": pipeline.scan_backend,
            "weights_hash": pipeline.weights_hash,
            "version": self.version,
            "limits": {
                "cfg_scale": {
                    "minimum": self.cfg_range[0],
                    "maximum": self.cfg_range[1],
                    "default": self.default_cfg_scale,
                },
                "guidance_interval": {"minimum": 0, "maximum": self.max_steps - 1}
                if self.conditional
                else None,
                "num_images": {"minimum": 1, "maximum": self.max_images_per_request, "default": 1},
                "steps": {"minimum": 1, "maximum": self.max_steps, "default": dict(DEFAULT_STEPS)},
                "seed": {"minimum": 0, "maximum": MAX_SEED},
                "samplers": list(SAMPLERS),
                "formats": list(IMAGE_FORMATS),
                "previews": {"minimum": 0, "maximum": self.max_previews, "default": 0},
                "priorities": list(PRIORITIES),
                "timeout_s": {"maximum": self.max_timeout_s, "default": self.default_timeout_s},
            },
        }


class Catalog:
    """The loaded models by name; the default is the one of the smallest resolution, of several the first.

    It never changes: what is loaded and unloaded makes another one.
    """

    def __init__(self, models: tuple[ServedModel, ...]) -> None:
        if not models:
            raise ValueError("models: none given; a server needs one or more")
        self.models = models
        self.default = min(models, key=lambda model: model.pipeline.resolution)
        self._by_name = {model.name: model for model in models}
        if len(self._by_name) != len(models):
            names = ", ".join(model.name for model in models)
            raise ValueError(
                f"models: {names} given; names must differ, whether they come from an index or a repository"
            )

    def with_model(self, model: ServedModel) -> Catalog:
        """This one with a further model, or with that one in the place of its namesake."""
        others = [model if other.name == model.name else other for other in self.models]
        return Catalog(tuple(others if model.name in self._by_name else [*others, model]))

    def without(self, name: str) -> Catalog:
        """This one without a model, which must not be the only one."""
        return Catalog(tuple(model for model in self.models if model.name != name))

    def describe(self) -> list[dict[str, Any]]:
        """All models as `/v1/models` lists them, ascending by id."""
        return [self._by_name[name].describe() for name in sorted(self._by_name)]

    def accepted(self, name: str | None = None) -> dict[str, str]:
        """What each field may be, for the named model or else the default one."""
        model = self._by_name.get(name or "", self.default)
        resolutions = sorted({model.pipeline.resolution for model in self.models})
        return model.accepted() | {
            "model": _alternatives(sorted(self._by_name)),
            "resolution": _alternatives([str(resolution) for resolution in resolutions]),
        }

    def model(self, name: str) -> ServedModel:
        """The model of that id."""
        return self._by_name[name]

    def find(self, name: str) -> ServedModel:
        """The model of that id. Raises NotFound, naming the ids that there are."""
        if name not in self._by_name:
            names = _alternatives(sorted(self._by_name))
            raise NotFound(f"model: {shown(name)} given; this server has {names}")
        return self._by_name[name]

    def select(self, name: str | None, resolution: int | None) -> ServedModel:
        """The model that a request means: by `model`, by `resolution`, or else the default one."""
        if name is not None:
            if name not in self._by_name:
                raise InvalidField("model", name, self.accepted()["model"], by="this server")
            model = self._by_name[name]
            if resolution not in (None, model.pipeline.resolution):
                raise InvalidField("resolution", resolution, model.accepted()["resolution"])
            return model
        if resolution is None:
            return self.default
        matching = [model for model in self.models if model.pipeline.resolution == resolution]
        if not matching:
            raise InvalidField("resolution", resolution, self.accepted()["resolution"], by="this server")
        if len(matching) > 1:
            names = _alternatives([model.name for model in matching])
            raise InvalidField("model", None, f"{names} at resolution {resolution}", by="this server")
        return matching[0]

    def resolve(self, body: GenerateRequest, request_id: str) -> GenerationRequest:
        """The work that a request asks for. Raises InvalidField with the model's own limits."""
        model = self.select(body.model, body.resolution)
        steps = DEFAULT_STEPS[body.sampler] if body.steps is None else body.steps
        timeout_s = model.default_timeout_s if body.timeout_s is None else body.timeout_s
        cfg_scale = model.default_cfg_scale if body.cfg_scale is None else body.cfg_scale
        _check_range(model, "num_images", body.num_images, 1, model.max_images_per_request)
        _check_range(model, "steps", steps, 1, model.max_steps)
        _check_range(model, "cfg_scale", cfg_scale, *model.cfg_range)
        _check_range(model, "previews", body.previews, 0, model.max_previews)
        if timeout_s is not None and not 0 < timeout_s <= model.max_timeout_s:
            raise InvalidField("timeout_s", timeout_s, model.accepted()["timeout_s"])
        return GenerationRequest(
            request_id=request_id,
            model=model.name,
            version=model.version,
            class_label=model.class_label(body.class_id),
            guidance_scale=float(cfg_scale),  # the one place where the public name becomes the mathematics'
            guidance_interval=_guidance_interval(model, body.guidance_interval),
            num_inference_steps=steps,
            sampler=body.sampler,
            seed=secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed,
            image_index=body.image_index,
            num_images=body.num_images,
            priority=body.priority,
            timeout_s=timeout_s,
            num_previews=body.previews,
        )


def _guidance_interval(model: ServedModel, given: Sequence[int] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    low, high = given
    if not model.conditional or not 0 <= low <= high < model.max_steps:
        raise InvalidField("guidance_interval", given, model.accepted()["guidance_interval"])
    return low, high


def _check_range(model: ServedModel, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidField(name, value, model.accepted()[name])


def _alternatives(values: Sequence[str]) -> str:
    return " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else list(values))
