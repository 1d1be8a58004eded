"""Request and response bodies of `/generate`, the query of `/v1/classes`, and the body of an error.

Types are strict, as JSON writes them: "5" is not 5, 5.0 is not an integer, true is not 1. Unknown fields
are errors. Ranges are the loaded model's and are checked by `service.catalog`, not here.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.images import ImageFormat
from model.limits import MAX_IMAGE_INDEX, MAX_SEED
from service.engine.request import Priority

__all__ = [
    "MAX_CLASSES",
    "MAX_TEXT",
    "AdminModel",
    "AdminModelList",
    "ClassList",
    "ClassQuery",
    "ErrorBody",
    "ErrorDetail",
    "GenerateRequest",
    "GenerateResponse",
    "GeneratedImage",
    "ModelState",
    "ServedClass",
    "ServedVersion",
    "VersionInfo",
]

MAX_TEXT: Final = 200
"""Characters of a label: near ones are searched for, which has to stay cheap."""
MAX_CLASSES: Final = 1000
"""Classes in one answer of `/v1/classes`."""

ModelState = Literal["available", "loading", "loaded", "unloading"]


class RequestBody(BaseModel):
    """What every body is read by: no field passes for another, and no value for one of another type."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


class GenerateRequest(RequestBody):
    """What to generate."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"class_id": 0, "cfg_scale": 2.5, "steps": 20, "seed": 0}]}
    )

    class_id: int | Annotated[str, Field(max_length=MAX_TEXT)] | None = Field(
        None,
        description="Class by id or label, as GET /v1/models lists them; none for a model without classes.",
    )
    cfg_scale: float | None = Field(
        None, description="Classifier-free guidance; 1 turns it off. Default: the model's own."
    )
    guidance_interval: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Least and greatest timestep with guidance, of those of training: 0 is the cleanest, the "
        "last one pure noise. A step outside costs half. Default: guidance at every step.",
    )
    resolution: int | None = Field(
        None, description="Pixels a side, which picks the model. Default: the smallest."
    )
    model: str | None = Field(
        None, max_length=MAX_TEXT, description="Model id; needed only where two have the same resolution."
    )
    num_images: int = Field(1, description="Images to generate.")
    steps: int | None = Field(
        None, description="Denoising steps. Default: 250 for ddpm, 50 for ddim, 20 for dpm++."
    )
    sampler: Literal["ddpm", "ddim", "dpm++"] = Field("dpm++", description="How noise is taken away.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Fixes the images. Default: drawn, and reported in the answer."
    )
    image_index: int = Field(
        0,
        ge=0,
        le=MAX_IMAGE_INDEX,
        description="Index of the first image under its seed: image j of a request uses "
        "(seed, image_index + j), so one image of many can be made again alone.",
    )
    format: ImageFormat | None = Field(
        None, description="Image format. Default: the one that the Accept header names, else png."
    )
    quality: int = Field(90, ge=1, le=100, description="Quality of jpeg and webp; png is lossless.")
    previews: int = Field(
        0,
        description="Previews of each image while it is made, spread over its steps: rough pictures in the "
        "events of an answer to `Accept: text/event-stream`. Fewer come where there are fewer steps.",
    )
    priority: Priority = Field(
        "normal", description="Which waiting requests go first; one that waits rises with time."
    )
    timeout_s: float | None = Field(
        None,
        description="Seconds after which a request that is not finished is given up and answered with 504. "
        "Default: the server's, else as long as it takes.",
    )


class GeneratedImage(BaseModel):
    """One image of an answer."""

    index: int = Field(description="Place in the request, from 0.")
    seed: int
    image_index: int = Field(description="With the seed, what makes this image again.")
    b64_json: str = Field(description="The encoded image in base64.")


class GenerateResponse(BaseModel):
    """An answer in JSON; the same facts are response headers where the answer is an image."""

    model_config = ConfigDict(protected_namespaces=())

    request_id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    class_id: int | None
    class_label: str | None
    cfg_scale: float
    guidance_interval: list[int] | None
    resolution: int
    steps: int
    sampler: str
    seed: int
    seeds: list[int] = Field(description="The seed of each image.")
    format: str
    images: list[GeneratedImage]
    timings: dict[str, float] = Field(description="Seconds in queue, denoise, decode, encode, and total.")


class ClassQuery(BaseModel):
    """Which classes to list."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    q: str = Field(
        "", max_length=MAX_TEXT, description="Part of an id or a label, in any case. Default: every class."
    )
    model: str | None = Field(None, max_length=MAX_TEXT, description="Model id, as in /generate.")
    resolution: int | None = Field(None, description="Pixels a side, as in /generate. Default: the smallest.")
    limit: int = Field(20, ge=1, le=MAX_CLASSES, description="Most classes to list.")


class ServedClass(BaseModel):
    """One class of a model."""

    class_id: int
    label: str


class ClassList(BaseModel):
    """Classes of one model, the best match first."""

    object: Literal["list"] = "list"
    model: str
    resolution: int
    total: int = Field(description="Matches, those beyond the limit included.")
    data: list[ServedClass]


class ServedVersion(BaseModel):
    """What one model runs on."""

    id: str
    device: str
    dtype: str
    scan_backend: str
    weights_hash: str


class VersionInfo(BaseModel):
    """What answers."""

    version: str = Field(description="Of the installed package.")
    python: str
    torch: str
    models: list[ServedVersion] = Field(description="Empty until they are loaded.")


class AdminModel(BaseModel):
    """A model that is loaded, or could be."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    state: ModelState = Field(
        description="available: could be loaded. loading: a version is being loaded, beside the one that is "
        "served, if any. loaded: requests get it. unloading: its last images are being made."
    )
    version: int | None = Field(description="That new requests get: which load of this name it is, from 1.")
    weights_hash: str | None = Field(description="Of that version.")
    resolution: int | None = Field(description="Of that version, pixels a side.")
    retiring: dict[int, int] = Field(
        description="Images in the making of versions that new requests do not get, by version."
    )
    last_error: str | None = Field(description="Why the last load failed, if it did.")


class AdminModelList(BaseModel):
    """All models that are loaded or could be, ascending by id."""

    object: Literal["list"] = "list"
    data: list[AdminModel]


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="Stable; for programs.")
    message: str = Field(description="For people.")
    request_id: str
    field: str | None = None
    value: Any = None
    accepted: str | None = None
    queue_s: float | None = Field(None, description="Of a 504: seconds that the request waited for a slot.")
    steps_done: int | None = Field(None, description="Of a 504: denoising steps done, of all images.")
    steps: int | None = Field(None, description="Of a 504: denoising steps that the request takes.")


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail
