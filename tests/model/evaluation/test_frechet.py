"""If this fails, the distances that models are compared by are wrong."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from model.evaluation.frechet import FeatureStatistics, StatisticsStream, frechet_distance

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


def test_frechet_distance_equals_that_by_scipys_root_of_the_product() -> None:
    one, two = _covariance(1), _covariance(4)
    root = scipy.linalg.sqrtm((one @ two).numpy()).real
    expected = (_mean(0) - _mean(2)).square().sum() + (one.trace() + two.trace()) - 2 * np.trace(root)
    distance = frechet_distance(_mean(0), one, _mean(2), two)
    assert distance == pytest.approx(float(expected), abs=TOLERANCE)


def test_frechet_distance_of_features_equals_torchmetrics() -> None:
    extractor = nn.Flatten().double()
    extractor.num_features = DIMENSIONS
    oracle = FrechetInceptionDistance(feature=extractor, normalize=True, input_img_size=(3, 2, 4))
    oracle.set_dtype(torch.float64)
    streams = StatisticsStream(), StatisticsStream()
    for stream, spread in zip(streams, (1.0, 0.7), strict=True):
        images = spread * torch.rand(200, 3, 2, 4, dtype=torch.float64)
        oracle.update(images, real=spread == 1)
        stream.add(images.flatten(1))
    one, two = (stream.statistics() for stream in streams)
    assert one.distance(two) == pytest.approx(oracle.compute().item(), rel=1e-9)


def _statistics(*batches: torch.Tensor) -> FeatureStatistics:
    stream = StatisticsStream()
    for batch in batches:
        stream.add(batch)
    return stream.statistics()


def test_statistics_of_a_stream_equal_numpy() -> None:
    features = torch.randn(100, DIMENSIONS) * 3 + 700
    statistics = _statistics(features[:1], features[1:40], features[40:])
    array = features.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), array.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(array, rowvar=False), atol=1e-11)
    assert statistics.count == 100


def test_streams_merge_into_that_of_all() -> None:
    features = torch.randn(100, DIMENSIONS)
    one, two = StatisticsStream(), StatisticsStream()
    one.add(features[:30])
    two.add(features[30:])
    one.merge(StatisticsStream())
    one.merge(two)
    merged, whole = one.statistics(), _statistics(features)
    torch.testing.assert_close(merged.mean, whole.mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, atol=1e-12, rtol=0)
    empty = StatisticsStream()
    empty.merge(one)
    assert empty.statistics().count == 100


def test_statistics_do_not_depend_on_order() -> None:
    features, other = torch.randn(100, DIMENSIONS), _statistics(torch.randn(50, DIMENSIONS))
    shuffled = features[torch.randperm(100)]
    assert _statistics(features).distance(other) == pytest.approx(
        _statistics(shuffled).distance(other), abs=TOLERANCE
    )


def test_statistics_of_one_vector_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features: 1 vectors given; 2 or more have a covariance"):
        _statistics(torch.zeros(1, DIMENSIONS))
    with pytest.raises(ValueError, match=r"features: shape \(24,\) given; \(n, d\) with n >= 1"):
        StatisticsStream().add(torch.zeros(DIMENSIONS))
