"""If this fails, an evaluation's pictures are mislabelled, missing or too large to keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.evaluation import pictures
from model.evaluation.pictures import class_grid, labelled_grid, save_picture, spread


def _flat(*levels: int) -> np.ndarray:
    return np.stack([np.full((20, 30, 3), level, dtype=np.uint8) for level in levels])


def test_labelled_grid_places_images_and_labels() -> None:
    grid = np.asarray(
        labelled_grid([list(_flat(10, 60)), list(_flat(110))], ["one", "two"], ["a", "long name"])
    )
    right = grid[:, -62:]  # two images of 30 px and their gaps
    assert [int(right[40, 10, 0]), int(right[40, 42, 0]), int(right[62, 10, 0])] == [10, 60, 110]
    assert (right[62, 42] == 255).all()  # the second row has one image
    assert (grid[:, :-62] < 128).any()
    assert (grid[:20] < 128).any()


def test_class_grid_has_a_row_for_each_class() -> None:
    grid = np.asarray(class_grid(_flat(0, 50, 100, 10, 60, 110), ("a", "b", "c")))
    columns = grid[:, -62:]
    assert columns[10::22, 10, 0].tolist() == [0, 50, 100]
    assert columns[10::22, 42, 0].tolist() == [10, 60, 110]


def test_save_picture_prefers_png_and_keeps_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert save_picture(noise, tmp_path, "small") == "small.png"
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 4000)
    assert save_picture(noise, tmp_path, "large") == "large.jpg"
    assert (tmp_path / "large.jpg").stat().st_size <= 4000


@pytest.mark.parametrize(("total", "wanted", "expected"), [(21, 6, [0, 3, 7, 10, 14, 17]), (2, 6, [0, 1])])
def test_spread_is_even_and_without_repetition(total: int, wanted: int, expected: list[int]) -> None:
    assert spread(total, wanted) == expected
