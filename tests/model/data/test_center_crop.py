"""If these fail, models are trained and compared on other pixels than everybody else's."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.data.center_crop import BadImageError, center_crop, decode_image
from tests.image_files import jpeg


def random_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def resampled(pixels: NDArray[np.uint8], size: int, axis: int) -> NDArray[np.float64]:
    """Bicubic (a = -0.5), its support stretched where it reduces, along one axis, in float64."""
    moved = np.moveaxis(pixels.astype(np.float64), axis, 0)
    length = moved.shape[0]
    stretch = max(length / size, 1.0)
    centres = (np.arange(size) + 0.5) * length / size
    x = np.abs((np.arange(length) + 0.5)[None] - centres[:, None]) / stretch
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weights = np.where(x < 2, weights, 0)
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, moved, axes=1), 0, axis)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(50, 37, 16), (37, 51, 16), (33, 64, 16), (16, 16, 16), (20, 11, 16), (32, 32, 16), (31, 45, 16)],
    ids=["landscape", "portrait", "exact-halving", "same", "enlarged", "square", "odd"],
)
def test_center_crop_is_box_halvings_then_bicubic_then_the_middle(width: int, height: int, size: int) -> None:
    image = random_image(width, height)
    pixels = np.asarray(image)
    while min(pixels.shape[:2]) >= 2 * size:
        h, w = pixels.shape[0] // 2, pixels.shape[1] // 2
        # An odd side is not cut but resampled: then Pillow's own box filter is the reference.
        if pixels.shape[0] % 2 or pixels.shape[1] % 2:
            pixels = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BOX))
        else:
            means = pixels.reshape(h, 2, w, 2, 3).mean((1, 3))
            pixels = np.floor(means + 0.5).astype(np.uint8)
    scale = size / min(pixels.shape[:2])
    h, w = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
    horizontal = np.clip(np.round(resampled(pixels, w, 1)), 0, 255).astype(np.uint8)
    expected = np.clip(resampled(horizontal, h, 0), 0, 255)
    top, left = (h - size) // 2, (w - size) // 2
    expected = expected[top : top + size, left : left + size]
    result = center_crop(image, size)
    assert result.shape == (size, size, 3)
    assert np.abs(result - expected).max() <= 2  # roundings of each pass, and of each halving


def test_center_crop_of_a_wanted_square_changes_nothing() -> None:
    image = random_image(16, 16)
    assert np.array_equal(center_crop(image, 16), np.asarray(image))


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("1", "png"),
        ("CMYK", "jpeg"),
        ("L", "jpeg"),
    ],
)
def test_decode_image_converts_as_pillow_does(mode: str, format: str) -> None:
    content = encoded(random_image(20, 20).convert(mode), format)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decode_image(content, 20), expected)


def test_decode_image_takes_16_bits() -> None:
    grey = np.full((20, 20), 77, np.uint16)
    assert (decode_image(encoded(Image.fromarray(grey), "png"), 16) == 77).all()


def test_center_crop_refuses_a_strip() -> None:
    with pytest.raises(BadImageError, match="5000 x 1 pixels, too long and thin"):
        center_crop(Image.new("RGB", (5000, 1)), 256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (jpeg(0)[:-60], "truncated"),
        (encoded(random_image(9, 9), "png")[:-60], "."),
        (b"P6 0 0 255\n", "."),
    ],
    ids=["zero-bytes", "no-image", "truncated-jpeg", "truncated-png", "zero-size"],
)
def test_decode_image_refuses_what_is_no_whole_image(content: bytes, message: str) -> None:
    with pytest.raises(BadImageError, match=message):
        decode_image(content, 16)
