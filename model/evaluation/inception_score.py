"""Inception Score (Salimans et al., "Improved techniques for training GANs", 2016) of a stream of images.

    exp of the mean over images of KL(p || mean p) = sum p log p - sum (mean p) log (mean p)

taken of each `SPLIT_SIZE` images in their order, as ADM's evaluation does, then averaged over these splits.
Both sums are kept by split, so that processes may share the images out in any way.

Legend: n images, K classes.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

__all__ = ["SPLIT_SIZE", "InceptionScoreStream"]

SPLIT_SIZE = 5000


class InceptionScoreStream:
    """Sums over the images of each split, float64."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, Tensor, Tensor]] = {}  # images, sum of p (K,), sum of p log p ()

    def add(self, first: int, probabilities: Tensor) -> None:
        """Take in (n, K) of the images with the numbers `first`, `first` + 1, .."""
        p = probabilities.double().cpu()
        splits = torch.arange(first, first + len(p)) // SPLIT_SIZE
        for split in splits.unique().tolist():
            part = p[splits == split]
            self._join(split, (len(part), part.sum(dim=0), torch.xlogy(part, part).sum()))

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        for split, sums in other._sums.items():
            self._join(split, sums)

    def score(self) -> float:
        """Of at least one image; between 1 and K."""
        scores = []
        for count, total, entropy in self._sums.values():
            mean = total / count
            scores.append((entropy / count - torch.xlogy(mean, mean).sum()).exp())
        return torch.stack(scores).mean().item()

    def _join(self, split: int, sums: tuple[int, Tensor, Tensor]) -> None:
        if split in self._sums:
            count, total, entropy = self._sums[split]
            sums = (count + sums[0], total + sums[1], entropy + sums[2])
        self._sums[split] = sums
