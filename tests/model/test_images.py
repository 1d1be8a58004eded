"""model/images.py: if this fails, a saved picture no longer tells how it was made, or is not the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from model.images import IMAGE_FORMATS, encode_image, image_grid, image_metadata, read_metadata

METADATA = image_metadata(
    seed=7,
    image_index=2,
    class_label="venice square",
    guidance_scale=2.5,
    num_inference_steps=20,
    sampler="dpm++",
    model="places-128",
    weights_hash="0123456789ab",
)


def smooth_picture(height: int = 24, width: int = 40) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 5, columns * 3, rows + columns], axis=-1).astype(np.uint8)


def test_image_metadata_keeps_the_settings_and_drops_what_is_absent() -> None:
    assert METADATA["cfg"] == "2.5"
    assert METADATA["class"] == "venice square"
    unconditional = image_metadata(
        seed=0,
        image_index=0,
        class_label=None,
        guidance_scale=1.0,
        num_inference_steps=5,
        sampler="ddim",
        model="m",
        weights_hash="",
    )
    assert "class" not in unconditional
    assert unconditional["seed"] == "0"


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_encode_image_round_trips_pixels_and_metadata(format: str) -> None:
    pixels = smooth_picture()
    encoded = encode_image(pixels, format, 95, METADATA)
    assert read_metadata(encoded) == METADATA
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format == format.upper()
        decoded = np.asarray(image.convert("RGB"))
    difference = np.abs(decoded.astype(int) - pixels.astype(int)).max()
    assert difference == 0 if format == "png" else difference < 24


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_encode_image_keeps_labels_beyond_latin1(format: str) -> None:
    encoded = encode_image(smooth_picture(), format, 80, {"class": "広場 ✓"})
    assert read_metadata(encoded) == {"class": "広場 ✓"}


def test_encode_image_png_has_one_text_chunk_a_key() -> None:
    with Image.open(io.BytesIO(encode_image(smooth_picture(), "png", 90, METADATA))) as image:
        assert image.text == METADATA


def test_encode_image_quality_matters_to_the_lossy_formats_alone() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for format in ("jpeg", "webp"):
        assert len(encode_image(noisy, format, 95, {})) > len(encode_image(noisy, format, 20, {}))
    assert encode_image(noisy, "png", 1, {}) == encode_image(noisy, "png", 100, {})


def test_encode_image_accepts_non_contiguous_pixels() -> None:
    pixels = smooth_picture()[:, ::2]
    with Image.open(io.BytesIO(encode_image(pixels, "png", 90, {}))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"pixels": np.zeros((4, 4, 3), np.float32)}, "pixels: float32", id="dtype"),
        pytest.param({"pixels": np.zeros((4, 4), np.uint8)}, "pixels: uint8", id="shape"),
        pytest.param({"format": "gif"}, "format: gif given", id="format"),
        pytest.param({"quality": 0}, "quality: 0 given", id="quality"),
    ],
)
def test_encode_image_rejects_what_it_cannot_write(change: dict, message: str) -> None:
    arguments = {"pixels": smooth_picture(), "format": "png", "quality": 90, "metadata": {}} | change
    with pytest.raises(ValueError, match=message):
        encode_image(**arguments)


def test_read_metadata_of_a_foreign_picture_is_empty() -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth_picture()).save(buffer, format="jpeg")
    assert read_metadata(buffer.getvalue()) == {}


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [
        pytest.param(1, None, (4, 6, 3), id="one"),
        pytest.param(4, None, (8, 12, 3), id="square"),
        pytest.param(5, None, (8, 18, 3), id="unfilled"),
        pytest.param(3, 8, (4, 18, 3), id="fewer-than-columns"),
        pytest.param(3, 1, (12, 6, 3), id="column"),
    ],
)
def test_image_grid_places_images_row_by_row(count: int, columns: int | None, shape: tuple) -> None:
    images = [np.full((4, 6, 3), index, np.uint8) for index in range(count)]
    grid = image_grid(images, columns)
    assert grid.shape == shape
    across = shape[1] // 6
    for index in range(count):
        top, left = 4 * (index // across), 6 * (index % across)
        assert (grid[top : top + 4, left : left + 6] == index).all()
    assert (grid[-1, -1] == (255 if across * (shape[0] // 4) > count else count - 1)).all()


def test_image_grid_rejects_nothing_and_no_columns() -> None:
    with pytest.raises(ValueError, match="images: none given"):
        image_grid([])
    with pytest.raises(ValueError, match="columns: 0 given"):
        image_grid([smooth_picture()], 0)
