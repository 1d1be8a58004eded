"""If these fail, training and evaluation see other pictures than they name, or geometry that is wrong."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model.data.places import (
    FIELD_OF_VIEW_DEGREES,
    PITCH_DEGREES,
    RESERVED_VIEW_IDS,
    Places,
    Views,
)


@pytest.fixture(scope="module")
def places() -> Places:
    return Places.load()


def single(panorama: NDArray[np.uint8]) -> Places:
    return Places(labels=["here"], panoramas=[panorama], class_ids=[0])


def view(
    *, yaw: float = 0.0, pitch: float = 0.0, field_of_view: float = math.pi / 3, flip: bool = False
) -> Views:
    zero = torch.zeros(1, dtype=torch.int64)
    return Views(
        class_ids=zero,
        panoramas=zero,
        yaw=torch.tensor([yaw]),
        pitch=torch.tensor([pitch]),
        field_of_view=torch.tensor([field_of_view]),
        flip=torch.tensor([flip]),
    )


def panorama_with_spot(longitude: float, latitude: float) -> NDArray[np.uint8]:
    """Black, with a red spot of about four degrees at this direction (radians)."""
    height, width = 256, 512
    panorama = np.zeros((height, width, 3), np.uint8)
    column = round((longitude / (2 * math.pi) + 0.5) * width)
    row = round((0.5 - latitude / math.pi) * height)
    columns = np.arange(column - 3, column + 3) % width
    panorama[row - 3 : row + 3, columns] = (255, 0, 0)
    return panorama


def spot_position(image: torch.Tensor) -> tuple[float, float]:
    """Centroid (x, y) of the red channel, in [-1, 1] with y upwards."""
    red = (image[0] + 1) / 2
    size = red.shape[0]
    ramp = (torch.arange(size) + 0.5) * 2 / size - 1
    return (red.sum(0) @ ramp / red.sum()).item(), -(red.sum(1) @ ramp / red.sum()).item()


def test_load_packaged_panoramas_match_their_index(places: Places) -> None:
    assert len(places.labels) == 21
    assert "Venice square" in places.labels
    folder = Path(str(files("model.data") / "places"))
    index = json.loads((folder / "places.json").read_text())
    assert len(index["panoramas"]) == 25
    for entry in index["panoramas"]:
        with Image.open(folder / entry["file"]) as image:
            assert image.size == (entry["width"], entry["height"])
        assert index["labels"][entry["class_id"]] == entry["label"]


def test_render_shape_range_and_labels(places: Places) -> None:
    images, labels = places.render(torch.arange(3), 24)
    assert images.shape == (3, 3, 24, 24)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert labels.dtype == torch.int64
    assert torch.equal(labels, places.views(torch.arange(3)).class_ids)


def test_render_does_not_depend_on_the_batch(places: Places) -> None:
    ids = torch.tensor([5, RESERVED_VIEW_IDS + 7, 0, 123_456_789_012])
    images, labels = places.render(ids, 32)
    for i in range(len(ids)):
        image, label = places.render(ids[i : i + 1], 32)
        assert torch.equal(image[0], images[i])
        assert label[0] == labels[i]


def test_render_in_chunks_equals_render_at_once(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(5)
    whole, _ = places.render(ids, 16)
    monkeypatch.setattr("model.data.places._SAMPLES_PER_CHUNK", 2 * 32**2)
    parts, _ = places.render(ids, 16)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_views_reserved_ids_are_views_of_their_own(places: Places) -> None:
    assert RESERVED_VIEW_IDS == 2**40
    trained, reserved = places.views(torch.arange(100)), places.views(torch.arange(100) + RESERVED_VIEW_IDS)
    assert not torch.isin(reserved.yaw, trained.yaw).any()


def test_views_are_balanced_and_within_range(places: Places) -> None:
    num = 21 * 400
    views = places.views(torch.arange(num))
    counts = torch.bincount(views.class_ids, minlength=21)
    assert (counts - 400).abs().max() < 5 * math.sqrt(400)  # 5 standard deviations
    city = views.panoramas[views.class_ids == 2]
    assert set(city.tolist()) == {2, 3}
    for angles, (low, high) in (
        (views.pitch, PITCH_DEGREES),
        (views.field_of_view, FIELD_OF_VIEW_DEGREES),
        (views.yaw, (0, 360)),
    ):
        degrees = torch.rad2deg(angles)
        assert degrees.min() >= low - 1e-3
        assert degrees.max() <= high + 1e-3
        assert abs(degrees.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert abs(views.flip.float().mean() - 0.5) < 0.03


@pytest.mark.parametrize(("yaw", "pitch"), [(0.0, 0.0), (1.2, 0.25), (3.1, -0.2), (6.0, 0.1)])
def test_render_views_looks_where_the_camera_points(yaw: float, pitch: float) -> None:
    image = single(panorama_with_spot(yaw, pitch)).render_views(view(yaw=yaw, pitch=pitch), 64)[0]
    x, y = spot_position(image)
    assert abs(x) < 0.02
    assert abs(y) < 0.02


@pytest.mark.parametrize("flip", [False, True])
def test_render_views_places_directions_by_pinhole_projection(flip: bool) -> None:
    right, up, field_of_view = math.radians(20), math.radians(15), math.radians(70)
    camera = view(field_of_view=field_of_view, flip=flip)
    x, y = spot_position(single(panorama_with_spot(right, up)).render_views(camera, 96)[0])
    extent = math.tan(field_of_view / 2)
    assert x == pytest.approx((-1 if flip else 1) * math.tan(right) / extent, abs=0.02)
    assert y == pytest.approx(math.tan(up) / math.cos(right) / extent, abs=0.02)


def test_render_views_has_no_seam() -> None:
    """A panorama rolled by half its width shows the same view half a turn away, across the seam."""
    panorama = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    middle = single(panorama).render_views(view(), 64)
    across = single(np.roll(panorama, 64, axis=1)).render_views(view(yaw=math.pi), 64)
    torch.testing.assert_close(across, middle, rtol=0, atol=2e-3)  # coordinates round to 1e-4 texels


def test_render_views_of_different_panorama_sizes_share_a_batch() -> None:
    flat = [np.full((h, 2 * h, 3), value, np.uint8) for h, value in ((32, 0), (64, 255), (16, 51))]
    places = Places(labels=["a", "b", "c"], panoramas=flat, class_ids=[0, 1, 2])
    images, labels = places.render(torch.arange(20), 8)
    expected = torch.tensor([-1.0, 1.0, -0.6])[labels]
    torch.testing.assert_close(images, expected[:, None, None, None].expand_as(images))


def test_load_refuses_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: .* given; accepted is a folder with a places\.json"):
        Places.load(tmp_path)
    entry = {"file": "a.webp", "class_id": 0}
    (tmp_path / "places.json").write_text(json.dumps({"labels": ["a"], "panoramas": [entry]}))
    with pytest.raises(ValueError, match=r"a\.webp"):
        Places.load(tmp_path)
    (tmp_path / "a.webp").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="folder: "):
        Places.load(tmp_path)


def test_places_refuses_labels_without_panorama() -> None:
    with pytest.raises(ValueError, match=r"class_ids: \[0\] given"):
        Places(labels=["a", "b"], panoramas=[np.zeros((4, 8, 3), np.uint8)], class_ids=[0])


def test_render_refuses_size_zero(places: Places) -> None:
    with pytest.raises(ValueError, match="size: 0 given"):
        places.render(torch.arange(1), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_render_is_the_same_on_cuda(places: Places) -> None:
    ids = torch.arange(8) + RESERVED_VIEW_IDS
    images, labels = Places.load(device="cuda").render(ids, 64)
    expected_images, expected_labels = places.render(ids, 64)
    assert torch.equal(labels.cpu(), expected_labels)
    torch.testing.assert_close(images.cpu(), expected_images, rtol=0, atol=4e-3)  # half a step of 8 bits
