"""Pixels to files: PNG, JPEG and WebP with the settings that made the picture, and grids of pictures.

What a file carries (`image_metadata` names it): seed, image index, class, cfg, the interval of timesteps
with guidance, steps, sampler, weights hash. A PNG has one text chunk a key, readable by any viewer; JPEG and
WebP have no text chunks and carry the same keys as one JSON object in the EXIF field UserComment.
`read_metadata` reads all three back. Pillow and numpy alone: importing this costs no torch.
"""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image, PngImagePlugin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "IMAGE_FORMATS",
    "MEDIA_TYPES",
    "ImageFormat",
    "encode_image",
    "encode_preview",
    "image_grid",
    "image_metadata",
    "read_metadata",
]

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
MEDIA_TYPES: dict[ImageFormat, str] = {name: f"image/{name}" for name in IMAGE_FORMATS}

_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_ASCII_COMMENT = b"ASCII\0\0\0"  # EXIF 2.32, 4.6.5: the first 8 bytes of UserComment name its character code


def image_metadata(
    *,
    seed: int,
    image_index: int,
    class_label: str | None,
    guidance_scale: float,
    guidance_interval: tuple[int, int] | None = None,
    num_inference_steps: int,
    sampler: str,
    model: str,
    weights_hash: str,
) -> dict[str, str]:
    """The settings that make an image again, as its file carries them.

    `class_label` None: no class; `guidance_interval` None: guidance at every step.
    """
    metadata = {
        "seed": str(seed),
        "image_index": str(image_index),
        "class": class_label or "",
        "cfg": f"{guidance_scale:g}",
        "cfg_interval": "-".join(str(timestep) for timestep in guidance_interval or ()),
        "steps": str(num_inference_steps),
        "sampler": sampler,
        "model": model,
        "weights": weights_hash,
        "Software": "LaMamba",
    }
    return {key: value for key, value in metadata.items() if value}


def encode_image(
    pixels: NDArray[np.uint8], format: ImageFormat, quality: int, metadata: Mapping[str, str]
) -> bytes:
    """Encode one image, (H, W, 3) uint8, with its metadata.

    `quality` (1 to 100) is that of JPEG and WebP; PNG is lossless and does not look at it.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels: {pixels.dtype} {pixels.shape} given; encode_image accepts uint8 (H, W, 3)")
    if format not in IMAGE_FORMATS:
        raise ValueError(f"format: {format} given; encode_image accepts {', '.join(IMAGE_FORMATS)}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: {quality} given; encode_image accepts 1 to 100")
    options: dict[str, Any]
    if format == "png":
        options = {"pnginfo": _text_chunks(metadata)}
    else:
        options = {"quality": quality, "exif": _exif(metadata)}
    if format == "jpeg":
        # 4:4:4 above 90: whoever asks for that quality does not want colours at half resolution.
        options["subsampling"] = 0 if quality > 90 else 2
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format=format, **options)
    return buffer.getvalue()


def encode_preview(pixels: NDArray[np.uint8], side: int, format: ImageFormat, quality: int) -> bytes:
    """Encode a preview, (h, w, 3) uint8, smoothly enlarged to `side` pixels, without metadata."""
    picture = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.BICUBIC)
    return encode_image(np.asarray(picture), format, quality, {})


def read_metadata(encoded: bytes) -> dict[str, str]:
    """What `encode_image` wrote into a file; empty where there is nothing of it."""
    with Image.open(io.BytesIO(encoded)) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            return dict(image.text)
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII_COMMENT):
        return {}
    return {str(key): str(value) for key, value in json.loads(comment.removeprefix(_ASCII_COMMENT)).items()}


def image_grid(images: Sequence[NDArray[np.uint8]], columns: int | None = None) -> NDArray[np.uint8]:
    """Tile equally large images, each (H, W, 3), row by row; unfilled cells stay white.

    `columns` None: as near to a square as the number of images allows.
    """
    if not images:
        raise ValueError("images: none given; image_grid accepts one or more")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if columns < 1:
        raise ValueError(f"columns: {columns} given; image_grid accepts 1 or more")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width, channels = images[0].shape
    grid = np.full((rows * height, columns * width, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * height, (index % columns) * width
        grid[top : top + height, left : left + width] = image  # (H, W, 3)
    return grid


def _text_chunks(metadata: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, value)  # falls back to iTXt (UTF-8) where Latin-1 does not hold the value
    return chunks


def _exif(metadata: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII_COMMENT + json.dumps(dict(metadata)).encode("ascii")
    return exif
