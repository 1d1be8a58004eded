"""The shape of OpenAI's Images API, and the one place where it becomes ours and back.

    prompt, n, size, output_format, output_compression  ->  class_id, num_images, resolution, format, quality
    InvalidField of /generate (422)                     ->  {"error": {message, type, param, code}} (400)

Fields that OpenAI has and a class-conditional model has no use for are accepted in their neutral values
alone: a setting that changes nothing must not pass for one that does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.images import ImageFormat
from model.limits import MAX_IMAGE_INDEX, MAX_SEED
from service.api.paths import route_path
from service.api.schemas import MAX_TEXT, GenerateRequest, RequestBody
from service.errors import InvalidField

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import Scope

    from service.errors import ServiceError

__all__ = [
    "ImagesRequest",
    "ImagesResponse",
    "OpenAIErrorBody",
    "openai_accepted",
    "openai_error",
    "openai_invalid_field",
    "speaks_openai",
]

_PATH: Final = "/v1/images"
_OURS: Final = {
    "prompt": "class_id",
    "n": "num_images",
    "size": "resolution",
    "output_format": "format",
    "output_compression": "quality",
    "partial_images": "previews",
}
_THEIRS: Final = {ours: theirs for theirs, ours in _OURS.items()}
_SIZE: Final = re.compile(r"([1-9][0-9]{0,4})x\1")
# What fields accept that `/generate` has not, or has otherwise.
_FIXED: Final = {
    "response_format": "b64_json alone, for this server keeps no images that a url could name",
    "output_compression": "0 to 100",
    "stream": "true or false",
    "partial_images": "0 to 3",
    "user": "text",
    "quality": "auto or standard",
    "background": "auto or opaque",
    "moderation": "auto or low",
    "style": "natural",
}


class ImagesRequest(RequestBody):
    """What to generate: OpenAI's fields, then ours."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "forest", "n": 1, "size": "auto", "seed": 0}]}
    )

    prompt: int | Annotated[str, Field(max_length=MAX_TEXT)] = Field(
        description="Class by id or label, as GET /v1/classes finds them; empty for a model without classes."
    )
    model: str | None = Field(
        None, max_length=MAX_TEXT, description="Model id. Default: the one of that size."
    )
    n: int | None = Field(1, description="Images to generate.")
    size: str | None = Field(
        "auto",
        max_length=MAX_TEXT,
        description="WIDTHxHEIGHT of a loaded model, or auto: that of `model`, or else the smallest.",
    )
    response_format: Literal["b64_json"] | None = Field(
        "b64_json", description="Images come in base64; there are no URLs."
    )
    output_format: ImageFormat | None = Field("png", description="Image format.")
    output_compression: int | None = Field(
        100, ge=0, le=100, description="Quality of jpeg and webp (0 is taken as 1); png is lossless."
    )
    stream: bool | None = Field(False, description="Answer in server-sent events.")
    partial_images: int | None = Field(
        0,
        ge=0,
        le=3,
        description="With `stream`, previews of each image on the way; fewer where there are fewer steps.",
    )
    user: str | None = Field(None, description="Accepted and not used.")
    quality: Literal["auto", "standard"] | None = Field(
        "auto", description="Neutral values only: `steps` and `cfg_scale` are what there is to set."
    )
    background: Literal["auto", "opaque"] | None = Field("auto", description="Images are opaque.")
    moderation: Literal["auto", "low"] | None = Field(
        "auto", description="Accepted and not used: a class is all that can be asked for."
    )
    style: Literal["natural"] | None = Field(None, description="Neutral value only.")
    cfg_scale: float | None = Field(None, description="As in /generate.")
    guidance_interval: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="As in /generate."
    )
    steps: int | None = Field(None, description="As in /generate.")
    sampler: Literal["ddpm", "ddim", "dpm++"] | None = Field(None, description="As in /generate.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="As in /generate.")
    image_index: int | None = Field(0, ge=0, le=MAX_IMAGE_INDEX, description="As in /generate.")

    def as_generate_request(self, accepted: Callable[[], Mapping[str, str]]) -> GenerateRequest:
        """The same request to `/generate`.

        Raises InvalidField, in its words, for a size that is none; `accepted` says what could be given.
        """
        compression = 100 if self.output_compression is None else self.output_compression
        fields = {
            "class_id": self.prompt.strip() or None if isinstance(self.prompt, str) else self.prompt,
            "model": self.model,
            "num_images": self.n,
            "resolution": self._resolution(accepted),
            "format": self.output_format or "png",
            "quality": max(1, compression),  # encoders begin at 1
            "cfg_scale": self.cfg_scale,
            "guidance_interval": self.guidance_interval,
            "steps": self.steps,
            "sampler": self.sampler,
            "seed": self.seed,
            "image_index": self.image_index,
            "previews": self.partial_images if self.stream else None,
        }
        return GenerateRequest.model_validate({k: v for k, v in fields.items() if v is not None})

    def _resolution(self, accepted: Callable[[], Mapping[str, str]]) -> int | None:
        if self.size in (None, "auto"):
            return None
        match = _SIZE.fullmatch(self.size or "")
        if match is None:
            raise InvalidField("resolution", self.size, accepted()["resolution"], by="this server")
        return int(match[1])


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str = Field(description="The encoded image in base64.")
    revised_prompt: str | None = Field(None, description="The label of the class that was generated.")
    seed: int
    image_index: int = Field(description="With the seed, what makes this image again.")


class ImagesResponse(BaseModel):
    """An answer in OpenAI's shape, with the facts of `/generate` beside it."""

    model_config = ConfigDict(protected_namespaces=())

    created: int = Field(description="Seconds since 1970.")
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    usage: dict[str, Any] = Field(description="Zeros: there are no tokens to count.")
    model: str
    class_id: int | None
    class_label: str | None
    cfg_scale: float
    guidance_interval: list[int] | None
    resolution: int
    steps: int
    sampler: str
    seed: int


class OpenAIError(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people.")
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field that is not accepted.")
    code: str = Field(description="Stable; for programs.")


class OpenAIErrorBody(BaseModel):
    """The body of every error under /v1/images."""

    error: OpenAIError


def speaks_openai(scope: Scope) -> bool:
    """Whether a request's errors are to be of OpenAI's shape."""
    path = route_path(scope)
    return path == _PATH or path.startswith(f"{_PATH}/")


def openai_accepted(accepted: Mapping[str, str]) -> dict[str, str]:
    """What each field of an ImagesRequest may be, from what the fields of `/generate` may be."""
    ours = {name: accepted.get(_OURS.get(name, name), "") for name in ImagesRequest.model_fields}
    return ours | _FIXED | {"size": _sizes(accepted["resolution"])}


def openai_invalid_field(error: InvalidField, body: ImagesRequest) -> InvalidField:
    """An error about a field of `/generate` as one about the field of `body` that it came from."""
    name = _THEIRS.get(error.field, error.field)
    accepted = _sizes(error.accepted) if name == "size" else error.accepted
    value = error.value if name in ("steps", "cfg_scale") else getattr(body, name, error.value)
    return InvalidField(name, value, accepted, by=error.by)


def openai_error(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error: OpenAI answers 400 to a field that is not accepted, not 422."""
    status = 400 if isinstance(error, InvalidField) else error.status
    kind = (
        "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    )
    param = error.field if isinstance(error, InvalidField) else None
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


def _sizes(resolutions: str) -> str:
    """ "128 or 256" as "auto, 128x128 or 256x256"."""
    separator = ", " if " or " in resolutions else " or "
    return f"auto{separator}" + re.sub(r"\d+", r"\g<0>x\g<0>", resolutions)
