"""How far a Frechet distance would move with other samples: its standard error by the jackknife.

The samples are dealt into g groups at random, as images may come in the order of their classes; d_i is the
distance of all but those of group i (Efron and Tibshirani, "An introduction to the bootstrap", 1993, section
11.5, for groups):
    error^2 = (g - 1) / g  sum_i (d_i - mean d)^2
It says nothing of what the distance depends on beside the samples: the reference, their number, for which a
distance is too large by a bias, and the seed of training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.evaluation.frechet import FeatureStatistics, StatisticsStream

__all__ = ["GROUPS", "distance_error", "distances_without", "jackknife_error"]

GROUPS = 10
"""g, or the number of samples where it is less."""


def distance_error(features: Tensor, reference: FeatureStatistics) -> float:
    """The standard error of the distance between features (n, d) and `reference`, on the features' device.

    ValueError for fewer than 3 vectors, as a group less has no covariance.
    """
    return jackknife_error(distances_without(features, reference))


def distances_without(features: Tensor, reference: FeatureStatistics) -> Tensor:
    """d_i, (g,) float64 on the CPU, the groups being the same for all sets of n features.

    ValueError for fewer than 3 vectors.
    """
    count = min(GROUPS, len(features))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    groups = [StatisticsStream() for _ in range(count)]
    for i, group in enumerate(groups):
        group.add(features[order[i::count]])

    def without(left_out: StatisticsStream) -> FeatureStatistics:
        rest = StatisticsStream()
        for group in groups:
            if group is not left_out:
                rest.merge(group)
        return rest.statistics().to(features.device)

    distances = reference.to(features.device).distances(without(group) for group in groups)
    return torch.tensor(distances, dtype=torch.float64)


def jackknife_error(without: Tensor) -> float:
    """The standard error by what is left without each group, (g,): distances, or differences of distances."""
    return float(without.var(correction=0).mul(len(without) - 1).sqrt())
