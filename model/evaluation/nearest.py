"""Nearest neighbours of a few images in a long stream of candidates, without keeping the stream.

Whether a model repeats its training data shows in how near its samples lie to training views, compared with
how near real views lie that it has not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.evaluation.features import FeatureExtractor
from model.evaluation.sources import Batches

__all__ = ["NearestSearch", "nearest_views"]


class NearestSearch:
    """The nearest candidate so far of each of n queries (n, d) fp32, by Euclidean distance over `unit`."""

    def __init__(self, queries: Tensor, unit: float = 1.0) -> None:
        self.queries, self.unit = queries, unit
        self.distances = torch.full((queries.shape[0],), torch.inf, device=queries.device)  # (n,)
        self.ids = torch.full((queries.shape[0],), -1, dtype=torch.int64, device=queries.device)  # (n,)

    def add(self, ids: Tensor, candidates: Tensor) -> None:
        """Compare candidates (m, d) with these ids (m,) int64; of equally near ones the first added stays."""
        distances, index = torch.cdist(self.queries, candidates).min(dim=1)  # (n,)
        distances = distances / self.unit
        nearer = distances < self.distances
        self.distances = torch.where(nearer, distances, self.distances)
        self.ids = torch.where(nearer, ids[index], self.ids)

    def summary(self, part: slice) -> dict[str, float]:
        """Median and smallest distance of some of the queries."""
        distances = self.distances[part]
        return {"median": round(distances.median().item(), 4), "smallest": round(distances.min().item(), 4)}


def nearest_views(
    images: Tensor, candidates: Batches, *, extractor: FeatureExtractor
) -> dict[str, NearestSearch]:
    """Search `candidates`, numbered from 0, for the nearest to `images` (n, H, W, 3) uint8.

    Under "features": by distance of features. Under "pixels": by root mean square difference in 8-bit levels.
    """
    searches = {
        "features": NearestSearch(extractor(images).pooled),
        "pixels": NearestSearch(images.flatten(1).float(), unit=images[0].numel() ** 0.5),
    }
    seen = 0
    for pixels, _ in candidates:
        ids = torch.arange(seen, seen + len(pixels), device=pixels.device)
        seen += len(pixels)
        searches["features"].add(ids, extractor(pixels).pooled)
        searches["pixels"].add(ids, pixels.flatten(1).float())
    return searches
