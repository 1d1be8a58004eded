"""If this fails, precision and recall are not those of ADM's evaluation."""

from __future__ import annotations

import numpy as np
import prdc
import pytest
import torch

from model.evaluation import manifold
from model.evaluation.manifold import neighbour_radii, precision_and_recall


def _points(*shape: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def test_radii_of_points_on_a_line() -> None:
    """Third nearest of 0, 1, 3, 7, 20, itself left out."""
    points = torch.tensor([0.0, 1.0, 3.0, 7.0, 20.0])[:, None]
    assert neighbour_radii(points).sqrt().tolist() == [7, 6, 4, 7, 19]


def test_precision_and_recall_of_points_on_a_line() -> None:
    """References reach from -7 to 39; only the sample at 50 is outside. Samples reach from -9 to 98."""
    references = torch.tensor([0.0, 1.0, 3.0, 7.0, 20.0])[:, None]
    samples = torch.tensor([2.0, 4.0, 8.0, 50.0])[:, None]
    assert precision_and_recall(references, samples) == (0.75, 1.0)
    assert precision_and_recall(samples, references) == (1.0, 0.75)


def test_a_surface_belongs_to_its_ball() -> None:
    references = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    assert precision_and_recall(references, torch.tensor([6.0, 6.1, -3.0, -3.1])[:, None])[0] == 0.5


def test_duplicates_are_neighbours_at_distance_zero() -> None:
    points = torch.cat([torch.zeros(4, 2), torch.ones(1, 2)])
    assert neighbour_radii(points).tolist() == [0, 0, 0, 0, 2]


def test_precision_of_a_part_is_one_and_recall_that_of_what_it_covers() -> None:
    references = torch.cat([_points(40, 3, seed=0), _points(40, 3, seed=1) + 1000])
    assert precision_and_recall(references, references[:40]) == (1.0, 0.5)


def test_precision_and_recall_equal_prdc(capsys: pytest.CaptureFixture[str]) -> None:
    references, samples = _points(300, 6, seed=0), _points(200, 6, seed=1, spread=0.7)
    expected = prdc.compute_prdc(
        references.double().numpy(), samples.double().numpy(), nearest_k=manifold.NEIGHBOUR
    )
    capsys.readouterr()  # it prints
    found = precision_and_recall(references, samples)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)
    assert 0 < found[1] < found[0] < 1


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    references, samples = _points(50, 4, seed=0), _points(41, 4, seed=1)
    whole, radii = precision_and_recall(references, samples), neighbour_radii(references)
    monkeypatch.setattr(manifold, "_ROWS", 7)
    monkeypatch.setattr(manifold, "_COLUMNS", 9)
    assert precision_and_recall(references, samples) == whole
    np.testing.assert_allclose(neighbour_radii(references), radii, rtol=1e-12)


def test_radii_of_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="features: 3 vectors given; at least 4 are accepted"):
        neighbour_radii(torch.zeros(3, 2))
