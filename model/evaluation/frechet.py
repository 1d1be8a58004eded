"""Frechet distance between two sets of feature vectors (Heusel et al., "GANs trained by a two time-scale
update rule", 2017, equation 6).

Each set is summed up by mean m and covariance C; the distance between the two normal distributions is
    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)
All in float64 by symmetric eigendecompositions: what stands under each root is positive semi-definite, so no
complex matrix root and no offset on the diagonal is needed. The features are the caller's choice; a value is
comparable to others of the same features and the same number of images alone.

Sets are streams: a batch of n vectors with mean b and scatter S (the sum of (x - b)(x - b)') joins N vectors
with mean m and scatter M by (Chan, Golub and LeVeque, 1979)
    M <- M + S + N n / (N + n) (b - m)(b - m)'        m <- m + n / (N + n) (b - m)
which loses no digits to means far from zero. Two streams, of two processes for one, join the same way.

Legend: n vectors, d features each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "StatisticsStream", "frechet_distance"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of a set of feature vectors."""

    mean: Tensor
    """(d,) float64."""
    covariance: Tensor
    """(d, d) float64, with n - 1 in the denominator."""
    count: int | None
    """n; None where whoever published the statistics does not say."""

    def to(self, device: torch.device) -> FeatureStatistics:
        """On another device: a GPU takes a decomposition's seconds, a CPU a minute."""
        return replace(self, mean=self.mean.to(device), covariance=self.covariance.to(device))

    def distance(self, other: FeatureStatistics) -> float:
        return self.distances([other])[0]

    def distances(self, others: Iterable[FeatureStatistics]) -> list[float]:
        """To each of `others`, on the same device; the root of this covariance is taken once for all."""
        root = _root(self.covariance)
        return [_distance(self.mean, self.covariance, root, other.mean, other.covariance) for other in others]


class StatisticsStream:
    """Mean and covariance of vectors that come in batches, in float64 on the device of the first batch."""

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._scatter = torch.empty(0), torch.empty(0)

    def add(self, features: Tensor) -> None:
        """Take in features (n, d)."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features: shape {tuple(features.shape)} given; (n, d) with n >= 1 is accepted")
        x = features.double()
        mean = x.mean(dim=0)
        centred = x - mean
        self._join(len(x), mean, centred.T @ centred)

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen; it may be on another device."""
        if other.count:
            self._join(other.count, other._mean, other._scatter)

    def cpu(self) -> Self:
        """This stream, moved to the CPU."""
        self._mean, self._scatter = self._mean.cpu(), self._scatter.cpu()
        return self

    def statistics(self) -> FeatureStatistics:
        """Of at least two vectors, on the CPU."""
        if self.count < 2:
            raise ValueError(f"features: {self.count} vectors given; 2 or more have a covariance")
        self.cpu()
        covariance = self._scatter / (self.count - 1)
        return FeatureStatistics(mean=self._mean, covariance=covariance, count=self.count)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            # The scatter is added to in place, and may be that of a stream which goes on.
            self.count, self._mean, self._scatter = count, mean, scatter.clone()
            return
        total = self.count + count
        gap = mean.to(self._mean.device) - self._mean
        self._scatter += scatter.to(self._scatter.device)
        self._scatter.addr_(gap, gap, alpha=self.count * count / total)
        self._mean = self._mean + gap * (count / total)
        self.count = total


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """d^2 of the module header, at least 0; means (d,) and symmetric covariances (d, d) on one device."""
    return _distance(mean1, cov1, _root(cov1), mean2, cov2)


def _root(covariance: Tensor) -> Tensor:
    """C^(1/2), float64."""
    variances, axes = torch.linalg.eigh(covariance.double())
    return (axes * variances.clamp_min(0).sqrt()) @ axes.T


def _distance(mean1: Tensor, cov1: Tensor, root1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    product = root1 @ cov2 @ root1
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    squared = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(0.0, squared.item())
