"""If this fails, a difference between models is taken for more, or for less, than the samples' chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.evaluation.frechet import FeatureStatistics, StatisticsStream
from model.evaluation.jackknife import GROUPS, distance_error

COUNT = 4000


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _statistics(features: torch.Tensor) -> FeatureStatistics:
    stream = StatisticsStream()
    stream.add(features)
    return stream.statistics()


def test_error_is_that_of_leaving_out_each_group_in_turn() -> None:
    """In one dimension the distance is (m1 - m2)^2 + (s1 - s2)^2; each group here is a single vector."""
    features, reference = _normal(0, GROUPS, 1), _normal(1, 50, 1)
    others = [np.delete(features.numpy(), i) for i in range(GROUPS)]
    mean, spread = reference.numpy().mean(), reference.numpy().std(ddof=1)
    distances = [(x.mean() - mean) ** 2 + (x.std(ddof=1) - spread) ** 2 for x in others]
    deviations = np.array(distances) - np.mean(distances)
    expected = math.sqrt((GROUPS - 1) / GROUPS * (deviations**2).sum())
    assert distance_error(features, _statistics(reference)) == pytest.approx(expected, rel=1e-9)


def test_error_of_a_shifted_mean_is_the_means_own() -> None:
    """Far from the reference the distance is the squared gap, whose error is twice the gap by s / sqrt(n)."""
    gap, reference = 10, _statistics(_normal(0, COUNT, 1))
    errors = [distance_error(_normal(seed, COUNT, 1) + gap, reference) for seed in range(1, 41)]
    # Ten groups tell an error to 24 % of itself, their mean over 40 draws to 4 %.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(2 * gap / math.sqrt(COUNT), rel=0.12)


def test_order_of_the_samples_is_no_matter() -> None:
    """Neither classes in a row nor classes in turn are taken for differences between groups."""
    reference = _statistics(_normal(0, COUNT, 1))
    classes = 40 * torch.arange(GROUPS, dtype=torch.float64)
    features = _normal(1, COUNT, 1)
    sorted_by_class = features + classes.repeat_interleave(COUNT // GROUPS)[:, None]
    in_turn = features + classes.repeat(COUNT // GROUPS)[:, None]
    mixed = [in_turn[torch.randperm(COUNT, generator=torch.Generator().manual_seed(i))] for i in range(20)]
    expected = np.mean([distance_error(given, reference) for given in mixed])
    for given in (sorted_by_class, in_turn):
        assert distance_error(given, reference) == pytest.approx(expected, rel=0.7)  # as one draw of it


def test_error_falls_with_the_root_of_the_number() -> None:
    reference = _statistics(_normal(0, COUNT, 8))
    few, many = (
        np.mean([distance_error(_normal(seed, count, 8) + 3, reference) for seed in range(1, 21)])
        for count in (250, 4000)
    )
    assert few / many == pytest.approx(4, rel=0.25)


def test_few_vectors_are_groups_of_one_and_two_are_refused() -> None:
    reference = _statistics(_normal(0, 20, 2))
    assert distance_error(_normal(1, 3, 2), reference) > 0
    with pytest.raises(ValueError, match="features: 1 vectors given; 2 or more have a covariance"):
        distance_error(_normal(1, 2, 2), reference)
