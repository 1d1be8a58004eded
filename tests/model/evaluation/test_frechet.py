"""If this fails, the distances that models are compared by are wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.evaluation.frechet import feature_statistics, frechet_distance

DIMENSIONS = 24

TOLERANCE = 1e-10  # float64; measured 3e-12 on values around 10


def _covariance(seed: int, rank: int = DIMENSIONS) -> torch.Tensor:
    factor = torch.randn(DIMENSIONS, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def _mean(seed: int) -> torch.Tensor:
    return torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_equal_distributions_is_zero() -> None:
    assert frechet_distance(_mean(0), _covariance(1), _mean(0), _covariance(1)) == pytest.approx(
        0, abs=TOLERANCE
    )


def test_frechet_distance_of_shifted_means_is_their_squared_distance() -> None:
    expected = (_mean(0) - _mean(2)).square().sum().item()
    assert frechet_distance(_mean(0), _covariance(1), _mean(2), _covariance(1)) == pytest.approx(
        expected, abs=TOLERANCE
    )


def test_frechet_distance_of_a_scaled_covariance() -> None:
    """C2 = s^2 C1 commutes with C1: d^2 = (1 - s)^2 tr C1."""
    covariance = _covariance(1)
    expected = (1 - 3) ** 2 * covariance.trace().item()
    distance = frechet_distance(_mean(0), covariance, _mean(0), 9 * covariance)
    assert distance == pytest.approx(expected, abs=TOLERANCE)


def test_frechet_distance_of_commuting_covariances() -> None:
    """With common axes the distance is the sum of the squared differences of standard deviations."""
    axes, _ = torch.linalg.qr(_covariance(3))
    one, two = (torch.rand(DIMENSIONS, dtype=torch.float64) + 0.1 for _ in range(2))
    expected = (one.sqrt() - two.sqrt()).square().sum().item()
    distance = frechet_distance(_mean(0), axes * one @ axes.T, _mean(0), axes * two @ axes.T)
    assert distance == pytest.approx(expected, abs=TOLERANCE)


def test_frechet_distance_of_general_covariances_is_that_of_the_product_root() -> None:
    """tr (C1^(1/2) C2 C1^(1/2))^(1/2) is the sum of the roots of the eigenvalues of C1 C2."""
    one, two = _covariance(1), _covariance(4)
    roots = np.sqrt(np.linalg.eigvals((one @ two).numpy()).real)
    expected = (one.trace() + two.trace()).item() - 2 * roots.sum()
    assert frechet_distance(_mean(0), one, _mean(0), two) == pytest.approx(expected, abs=TOLERANCE)


def test_frechet_distance_is_symmetric_and_takes_singular_covariances() -> None:
    one, two = _covariance(1, rank=5), _covariance(2)
    forth = frechet_distance(_mean(0), one, _mean(1), two)
    back = frechet_distance(_mean(1), two, _mean(0), one)
    assert forth == pytest.approx(back, abs=1e-6)  # roots of zero eigenvalues' rounding: 1e-16 ** 0.5
    assert frechet_distance(_mean(0), one, _mean(0), one) == pytest.approx(0, abs=1e-6)


def test_feature_statistics_equal_numpy() -> None:
    features = torch.randn(100, DIMENSIONS) * 3 + 7
    statistics = feature_statistics(features)
    array = features.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), array.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(array, rowvar=False), atol=1e-12)
    assert statistics.count == 100


def test_feature_statistics_do_not_depend_on_order() -> None:
    features = torch.randn(100, DIMENSIONS)
    shuffled = features[torch.randperm(100)]
    other = feature_statistics(torch.randn(50, DIMENSIONS))
    assert feature_statistics(features).distance(other) == pytest.approx(
        feature_statistics(shuffled).distance(other), abs=TOLERANCE
    )


def test_feature_statistics_of_one_vector_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features: shape \(1, 24\) given; \(n, d\) with n >= 2"):
        feature_statistics(torch.zeros(1, DIMENSIONS))
