"""What is asked for: kinds of requests and how often each comes, from a YAML (or JSON) file.

- steps: 10        # a list of entries; every field but steps has a default
  weight: 3
- steps: 50
  resolution: 256
  slo_s: 5.0
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import shown

__all__ = ["DEFAULT_MIX", "MixEntry", "load_mix", "mean_images"]

_SENT: Final = ("resolution", "steps", "sampler", "cfg_scale", "guidance_interval", "class_id", "num_images")


class MixEntry(BaseModel):
    """One kind of request. What a server accepts of it, the server knows."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(ge=1)
    name: str = Field("", max_length=40, description='In results; by default after the steps: "10-steps".')
    weight: float = Field(1.0, gt=0, description="How often it comes, against the other entries.")
    resolution: int | None = Field(None, ge=1, description="None: the server's default.")
    sampler: Literal["ddpm", "ddim", "dpm++"] = "dpm++"
    cfg_scale: float | None = Field(None, ge=1, description="None: the model's default.")
    guidance_interval: list[int] | None = Field(None, min_length=2, max_length=2)
    class_id: int | str | None = 0
    num_images: int = Field(1, ge=1)
    slo_s: float | None = Field(None, gt=0, description="None: the run's.")

    @property
    def label(self) -> str:
        """Its name in results."""
        return self.name or f"{self.steps}-steps"

    def body(self, seed: int) -> dict[str, Any]:
        """The body of a request to /generate."""
        return {"seed": seed} | self.model_dump(include=set(_SENT), exclude_none=True)


DEFAULT_MIX: Final = tuple(MixEntry(steps=steps, resolution=128) for steps in (10, 20, 30, 50))
"""Single guided images of 128 px, a quarter each of 10, 20, 30 and 50 steps."""


def load_mix(path: Path) -> tuple[MixEntry, ...]:
    """The entries of a file. Raises ValueError with one line: entry, field, value, what is accepted."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"mix: {path} given; it cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"mix: {path} given; it is neither YAML nor JSON") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"mix: {path} holds {shown(content)}; a list of one or more entries is accepted")
    mix = tuple(_entry(value, f"{path}: entry {index}") for index, value in enumerate(content, 1))
    labels = [entry.label for entry in mix]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{path}: name: {label} given {labels.count(label)} times; names must differ")
    return mix


def mean_images(mix: Sequence[MixEntry]) -> float:
    """Images of a request, on average."""
    return sum(entry.weight * entry.num_images for entry in mix) / sum(entry.weight for entry in mix)


def _entry(value: object, place: str) -> MixEntry:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {shown(value)} given; fields and their values are accepted")
    try:
        return MixEntry.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "fields"
        if first["type"] == "missing":
            raise ValueError(f"{place}: {field}: none given; {field} is required") from error
        accepted = first["msg"]
        if first["type"] == "extra_forbidden":
            accepted = f"accepted fields are {', '.join(MixEntry.model_fields)}"
        raise ValueError(f"{place}: {field}: {shown(first['input'])} given; {accepted}") from error
