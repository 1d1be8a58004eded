"""If this fails, models are compared with other images than an evaluation says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.places import RESERVED_VIEW_IDS, Places
from model.evaluation.archive import mapped_array, write_archive
from model.evaluation.sources import FolderImages, NpzImages, RealViews, balanced_view_ids, first_pixels


@pytest.fixture(scope="module")
def places() -> Places:
    generator = np.random.default_rng(0)
    panoramas = [generator.integers(0, 80, (32, 64, 3), dtype=np.uint8) for _ in range(2)]
    return Places(labels=("one", "two"), panoramas=panoramas, class_ids=(0, 1))


def test_views_are_reserved_ones_and_balanced_ids_go_through_the_classes(places: Places) -> None:
    ids = balanced_view_ids(places, per_class=3)
    assert places.views(ids).class_ids.tolist() == [0, 1, 0, 1, 0, 1]
    assert (ids >= RESERVED_VIEW_IDS).all()
    views = RealViews(places=places, first_id=RESERVED_VIEW_IDS, num=4, size=16)
    ((pixels, labels),) = views.batches(range(1, 4))
    images, expected = places.render(RESERVED_VIEW_IDS + torch.arange(1, 4), 16)
    assert torch.equal(labels, expected)
    assert (pixels.movedim(-1, 1).float() / 127.5 - 1 - images).abs().max() <= 0.5 / 127.5 + 1e-6


def test_npz_images_are_those_of_numpy_and_any_part_of_them(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(700)
    for save in (np.savez, np.savez_compressed):
        path = tmp_path / f"{save.__name__}.npz"
        save(path, arr_0=images, arr_1=labels)
        found = NpzImages(path)
        batches = list(found.batches(range(100, 650)))
        np.testing.assert_array_equal(torch.cat([pixels for pixels, _ in batches]), images[100:650])
        np.testing.assert_array_equal(torch.cat([label for _, label in batches]), labels[100:650])
        assert (found.num, found.size, found.published_statistics()) == (700, 4, None)
        np.testing.assert_array_equal(first_pixels(found, 3), images[:3])


def test_archives_are_numpys_and_the_same_each_time(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int64).reshape(6, 4)
    for name in ("one", "two"):
        write_archive(tmp_path / name, {"arr_0": (array.shape, array.dtype, [array[:5], array[5:]])})
    with np.load(tmp_path / "one") as archive:
        np.testing.assert_array_equal(archive["arr_0"], array)
    np.testing.assert_array_equal(mapped_array(tmp_path / "one", "arr_0"), array)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(ValueError, match="arr_0: parts of 5 rows given for 6"):
        write_archive(tmp_path / "three", {"arr_0": (array.shape, array.dtype, [array[:5]])})
    assert not (tmp_path / "three").exists()


IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "has no arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is float64 \(2, 4, 4, 3\); uint8"),
        ({"arr_0": np.zeros((2, 4, 5, 3), np.uint8)}, r"arr_0 is uint8 \(2, 4, 5, 3\); uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"arr_0 is uint8 \(0, 4, 4, 3\); uint8"),
        (
            {"arr_0": IMAGES, "arr_1": np.zeros(3, int)},
            r"arr_1 is int64 \(3,\) for 2 images; a class's number",
        ),
        ({"arr_0": IMAGES, "arr_1": np.full(2, np.nan)}, r"arr_1 is float64 \(2,\) for 2 images; a class's"),
        ({"arr_0": IMAGES, "arr_1": np.array(["a", "b"])}, r"arr_1 is <U1 \(2,\) for 2 images; a class's"),
    ],
)
def test_npz_images_name_what_is_wrong(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        NpzImages(tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("mean", "covariance"),
    [(np.zeros(3), np.eye(4)), (np.array([np.nan]), np.eye(1)), (np.array(["a"]), np.eye(1))],
    ids=["shape", "nan", "text"],
)
def test_published_statistics_that_are_none_are_refused(
    mean: np.ndarray, covariance: np.ndarray, tmp_path: Path
) -> None:
    statistics = {"mu": mean, "sigma": covariance, "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    np.savez(tmp_path / "images.npz", arr_0=IMAGES, **statistics)
    with pytest.raises(ValueError, match=r"images\.npz: mu is .*; finite numbers \(d,\) and \(d, d\) are"):
        NpzImages(tmp_path / "images.npz").published_statistics()


@pytest.mark.parametrize("damage", ["no archive", "header"])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, damage: str) -> None:
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    content = (
        (tmp_path / "images.npz")
        .read_bytes()
        .replace(b"'shape': (2, 4, 4, 3), }", b"'shape': (2, 4, 4, 3   ")
    )
    (tmp_path / "images.npz").write_bytes(b"nothing" if damage == "no archive" else content)
    with pytest.raises(ValueError, match=r"images\.npz cannot be read as \.npz"):
        NpzImages(tmp_path / "images.npz")


def test_folder_images_are_sorted_and_square(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, level, size in (("b/2.png", 20, (40, 30)), ("a.jpg", 10, (16, 16)), ("b/1.webp", 30, (30, 70))):
        Image.new("RGB", size, (level, level, level)).save(tmp_path / name, quality=100)
    (tmp_path / "notes.txt").write_text("no picture")
    images = FolderImages(tmp_path, 16)
    pixels = first_pixels(images, 10)
    assert pixels.shape == (3, 16, 16, 3)
    assert pixels.float().mean(dim=(1, 2, 3)).round().tolist() == [10, 30, 20]
    first = images.description
    assert (first["name"], first["num_images"]) == (tmp_path.name, 3)
    (tmp_path / "c.png").write_bytes(b"broken")
    broken = FolderImages(tmp_path, 16)
    assert broken.description["hash"] != first["hash"]
    with pytest.raises(ValueError, match=r"c\.png: cannot be read as a picture"):
        first_pixels(broken, 4)


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures in it"):
        FolderImages(tmp_path, 16)
