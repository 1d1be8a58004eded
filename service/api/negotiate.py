"""Which representation a client wants: image bytes, JSON or events, and which image format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from model.images import IMAGE_FORMATS, MEDIA_TYPES, ImageFormat
from service.errors import InvalidField

if TYPE_CHECKING:
    from service.api.schemas import GenerateRequest

__all__ = ["Representation", "negotiate"]

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"


@dataclass(frozen=True, kw_only=True)
class Representation:
    """How an answer is written."""

    as_bytes: bool
    """The image itself; else JSON with images in base64."""
    as_events: bool
    """Events on the way, and the JSON in the last of them."""
    format: ImageFormat


def negotiate(accept: str, body: GenerateRequest) -> Representation:
    """Read the Accept header (RFC 9110, section 12.5.1) beside the request.

    An image media type gets bytes where the request makes exactly one image, an event stream gets events,
    everything else JSON.
    `format` names the image format, else the Accept header does, else it is png; the two must not
    contradict each other.
    """
    wanted = _preferred(accept)
    format: ImageFormat = body.format or "png"
    if wanted in MEDIA_TYPES.values():
        named = IMAGE_FORMATS[list(MEDIA_TYPES.values()).index(wanted)]
        if body.format not in (None, named):
            raise InvalidField(
                "format", body.format, f"{named}, which the Accept header names", by="this request"
            )
        format = named
    if body.previews and wanted != _EVENTS:
        raise InvalidField(
            "previews", body.previews, f"0 unless its Accept header is {_EVENTS}", by="this request"
        )
    return Representation(
        as_bytes=wanted.startswith("image/") and body.num_images == 1,
        as_events=wanted == _EVENTS,
        format=format,
    )


def _preferred(accept: str) -> str:
    """The servable media type or range of the greatest weight, the first of equals; JSON if there is none."""
    best, best_weight = _JSON, 0.0
    for part in accept.split(","):
        media_range, _, parameters = part.partition(";")
        media_range = media_range.strip().lower()
        weight = _weight(parameters)
        if weight <= best_weight:
            continue
        if media_range in MEDIA_TYPES.values() or media_range in ("image/*", _EVENTS):
            best, best_weight = media_range, weight
        elif media_range in (_JSON, "application/*", "*/*"):
            best, best_weight = _JSON, weight
    return best


def _weight(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0
