"""Frechet distance between two sets of feature vectors (Heusel et al., "GANs trained by a two time-scale
update rule", 2017, equation 6).

Each set is summed up by mean m and covariance C; the distance between the two normal distributions is
    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)
All in float64 by symmetric eigendecompositions: what stands under each root is positive semi-definite, so no
complex matrix root and no offset on the diagonal is needed. The features are the caller's choice; a value is
comparable to others of the same features and the same number of images alone.

Legend: n vectors, d features each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "feature_statistics", "frechet_distance"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of a set of feature vectors."""

    mean: Tensor
    """(d,) float64."""
    covariance: Tensor
    """(d, d) float64, with n - 1 in the denominator."""
    count: int
    """n."""

    def distance(self, other: FeatureStatistics) -> float:
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Statistics of features (n, d), n at least 2."""
    count = features.shape[0]
    if features.ndim != 2 or count < 2:
        raise ValueError(f"features: shape {tuple(features.shape)} given; (n, d) with n >= 2 is accepted")
    x = features.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return FeatureStatistics(mean=mean, covariance=centred.T @ centred / (count - 1), count=count)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """d^2 of the module header, at least 0; means (d,) and symmetric covariances (d, d) on one device."""
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    variances, axes = torch.linalg.eigh(cov1)
    root = (axes * variances.clamp_min(0).sqrt()) @ axes.T  # C1^(1/2)
    product = root @ cov2 @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    squared = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(0.0, squared.item())
