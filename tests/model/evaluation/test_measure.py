"""If this fails, ranks or batches change a model's numbers, or numbers bear wrong names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from model.evaluation.features import load_extractor
from model.evaluation.frechet import frechet_distance
from model.evaluation.jackknife import distance_error
from model.evaluation.measure import MAX_REFERENCE_VECTORS, Measured, measure, measure_reference, metrics
from model.evaluation.ranks import Ranks
from model.evaluation.sources import NpzImages
from tests.extractors import MeanColour, TinyInception

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> NpzImages:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return NpzImages(tmp_path / "images.npz")


class _TwoRanks(Ranks):
    """One of two ranks in one process: rank 1 leaves what it gathers in `left`, rank 0 finds it there."""

    left: ClassVar[list[Any]] = []

    def gathered(self, value: Any) -> list[Any]:
        if self.is_main:
            return [value, *self.left]
        self.left.append(value)
        return []


def test_two_ranks_measure_what_one_does(images: NpzImages) -> None:
    extractors = [TinyInception(), MeanColour()]
    whole = measure(images, extractors, ranks=Ranks())
    _TwoRanks.left.clear()
    assert measure(images, extractors, ranks=_TwoRanks(rank=1, size=2)) is None
    shared = measure(images, extractors, ranks=_TwoRanks(rank=0, size=2))
    assert isinstance(whole, Measured)
    assert isinstance(shared, Measured)
    for one, two in zip(whole.summaries, shared.summaries, strict=True):
        torch.testing.assert_close(one.statistics.mean, two.statistics.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(one.statistics.covariance, two.statistics.covariance, atol=1e-8, rtol=0)
        assert torch.equal(one.vectors, two.vectors)
    one, two = (found.summaries[0].spatial_vectors for found in (whole, shared))
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
    first, second = whole.summaries[0], shared.summaries[0]
    assert first.inception_score == pytest.approx(second.inception_score, rel=1e-12)
    assert first.spatial is not None
    assert first.spatial.count == 600


def test_metrics_of_a_set_with_itself_are_perfect(images: NpzImages) -> None:
    measured = measure(images, [TinyInception()], ranks=Ranks())
    assert measured is not None
    (summary,) = measured.summaries
    rows = {row["metric"]: row for row in metrics(summary, summary, TinyInception())}
    assert rows["FID-600"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["sFID-600"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["Precision"]["value"] == rows["Recall"]["value"] == 1
    errors = {name: row["standard_error"] for name, row in rows.items()}
    spatial = summary.spatial_vectors
    assert spatial is not None
    assert summary.spatial is not None
    assert errors == {
        "FID-600": distance_error(summary.vectors, summary.statistics),
        "sFID-600": distance_error(spatial, summary.spatial),
        **dict.fromkeys(("Inception Score", "Precision", "Recall")),
    }
    assert [row["num_reference_images"] for row in rows.values()] == [600, 600, 0, 600, 600]


def test_only_inceptions_distance_is_called_fid(images: NpzImages) -> None:
    measured = measure(images, [MeanColour()], ranks=Ranks())
    assert measured is not None
    names = [row["metric"] for row in metrics(measured.summaries[0], measured.summaries[0], MeanColour())]
    assert names == [
        "Frechet distance (mean colour)-600",
        "Precision (mean colour)",
        "Recall (mean colour)",
    ]


def test_published_statistics_stand_for_inceptions_alone(images: NpzImages, tmp_path: Path) -> None:
    pixels = next(images.batches(range(8)))[0].numpy()
    published = {"mu": np.ones(3), "sigma": 2 * np.eye(3), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=pixels, **published)
    reference = NpzImages(tmp_path / "VIRTUAL.npz")
    found = measure_reference(reference, [TinyInception(), MeanColour()], ranks=Ranks())
    assert found is not None
    inception, colours = found.summaries
    assert inception.statistics.mean.tolist() == [1, 1, 1]
    assert inception.statistics.count is None
    assert colours.statistics.count == 8
    assert torch.equal(inception.vectors, colours.vectors)
    measured = measure(images, [TinyInception()], ranks=Ranks())
    assert measured is not None
    row = metrics(measured.summaries[0], inception, TinyInception())[0]
    own = measured.summaries[0].statistics
    expected = frechet_distance(
        own.mean, own.covariance, torch.ones(3), 2 * torch.eye(3, dtype=torch.float64)
    )
    assert row["value"] == pytest.approx(expected, rel=1e-12)
    assert row["num_reference_images"] is None


def test_only_the_first_references_are_kept(images: NpzImages, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_REFERENCE_VECTORS == 10_000
    monkeypatch.setattr("model.evaluation.measure.MAX_REFERENCE_VECTORS", 7)
    found = measure_reference(images, [MeanColour()], ranks=Ranks())
    assert found is not None
    assert (found.summaries[0].vectors.shape, found.summaries[0].statistics.count) == ((7, 3), 600)


@pytest.mark.parametrize("given", ["inception", "vgg", "dinov2=", "efficientnet-lite2=x", ""])
def test_an_unknown_extractor_is_answered_with_those_there_are(given: str) -> None:
    with pytest.raises(
        ValueError, match=f"extractor: '{given}' given; inception=FILE, dinov2=FOLDER, judge="
    ):
        load_extractor(given, CPU)


@pytest.mark.parametrize("given", ["inception=/nowhere/w.pth", "dinov2=/nowhere", "judge=/nowhere/j"])
def test_an_extractor_without_its_file_is_named(given: str) -> None:
    with pytest.raises(ValueError, match=r"(extractor|judge): /nowhere"):
        load_extractor(given, CPU)
