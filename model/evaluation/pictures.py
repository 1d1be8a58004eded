"""Labelled grids of images, as files of bounded size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["class_grid", "labelled_grid", "save_picture", "spread"]

MAX_PICTURE_BYTES = 4 * 2**20
"""No picture's file is larger."""

_FONT_SIZE = 15
_GAP = 2  # pixels between images
_MARGIN = 6  # pixels around text
_JPEG_QUALITIES = (90, 80, 65, 50)


def labelled_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Rows of equally large images (H, W, 3), each row's label left of it, each column's above it."""
    height, width, _ = rows[0][0].shape
    font = ImageFont.load_default(_FONT_SIZE)
    left = max((int(font.getlength(label)) for label in row_labels), default=0) + 2 * _MARGIN
    top = _FONT_SIZE + 2 * _MARGIN if column_labels else 0
    columns = max(map(len, rows))
    canvas = Image.new(
        "RGB", (left + columns * (width + _GAP), top + len(rows) * (height + _GAP)), color=(255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    for j, label in enumerate(column_labels):
        middle = (left + j * (width + _GAP) + width / 2, top / 2)
        draw.text(middle, label, fill=0, font=_narrow_font(label, width), anchor="mm")
    for i, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + i * (height + _GAP)
        draw.text((_MARGIN, y + height / 2), label, fill=0, font=font, anchor="lm")
        for j, pixels in enumerate(row):
            canvas.paste(Image.fromarray(pixels), (left + j * (width + _GAP), y))
    return canvas


def class_grid(images: NDArray[np.uint8], labels: Sequence[str]) -> Image.Image:
    """A row for each class, of images (n, H, W, 3) whose classes are 0, 1, .., K - 1, 0, 1, .."""
    shown = labels[: len(images)]
    return labelled_grid([list(images[c :: len(labels)]) for c in range(len(shown))], shown)


def save_picture(image: Image.Image, folder: Path, stem: str) -> str:
    """Write `stem`.png, or .jpg where a PNG would exceed `MAX_PICTURE_BYTES`; returns the file's name."""
    encoded, name = _encoded(image, "png"), f"{stem}.png"
    for quality in _JPEG_QUALITIES:
        if len(encoded) <= MAX_PICTURE_BYTES:
            break
        encoded, name = _encoded(image, "jpeg", quality=quality), f"{stem}.jpg"
    (folder / name).write_bytes(encoded)
    return name


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` different numbers below `total`, evenly spaced from 0."""
    return sorted({i * total // wanted for i in range(wanted)})


def _narrow_font(label: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The label font, made smaller where `label` would be wider than `width` pixels."""
    length = ImageFont.load_default(_FONT_SIZE).getlength(label)
    return ImageFont.load_default(_FONT_SIZE * min(1.0, (width - _MARGIN) / max(length, 1.0)))


def _encoded(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()
