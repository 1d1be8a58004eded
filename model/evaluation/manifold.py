"""Precision and recall of generated images (Kynkaanniemi et al., "Improved precision and recall metric for
assessing generative models", 2019), as ADM's evaluation takes them.

A set's manifold is the union of balls around its feature vectors, each reaching to the k-th nearest other
vector of the set. Precision is the share of samples inside the references' manifold, recall the share of
references inside the samples'. Exact: squared distances in float64, a tile of the matrix at a time.

Legend: n and m vectors, d features each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEIGHBOUR", "neighbour_radii", "precision_and_recall"]

NEIGHBOUR = 3
"""k; a vector is no neighbour of itself."""

_ROWS, _COLUMNS = 1024, 8192  # of a tile: 64 MB


def precision_and_recall(references: Tensor, samples: Tensor) -> tuple[float, float]:
    """Precision and recall, each in [0, 1], of vectors (n, d) and (m, d) on one device.

    ValueError for sets of `NEIGHBOUR` vectors or fewer, which have no k-th neighbour.
    """
    precision = _share_inside(samples, references, neighbour_radii(references))
    return precision, _share_inside(references, samples, neighbour_radii(samples))


def neighbour_radii(vectors: Tensor) -> Tensor:
    """The squared distance of each vector (n, d) to its `NEIGHBOUR`-th nearest other: (n,) float64."""
    if len(vectors) <= NEIGHBOUR:
        raise ValueError(f"features: {len(vectors)} vectors given; at least {NEIGHBOUR + 1} are accepted")
    radii = []
    for first, rows in _tiles(vectors, _ROWS):
        nearest = vectors.new_full((len(rows), NEIGHBOUR), torch.inf, dtype=torch.float64)
        for start, columns in _tiles(vectors, _COLUMNS):
            distances = _squared_distances(rows, columns)
            own = torch.arange(first, first + len(rows), device=vectors.device) - start
            inside = ((own >= 0) & (own < len(columns))).nonzero().flatten()
            distances[inside, own[inside]] = torch.inf
            both = torch.cat([nearest, distances], dim=1)
            nearest = both.topk(NEIGHBOUR, dim=1, largest=False, sorted=True).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of `points` that lie in a ball, its surface included."""
    inside = 0
    for _, rows in _tiles(points, _ROWS):
        found = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for start, columns in _tiles(centres, _COLUMNS):
            found |= (_squared_distances(rows, columns) <= radii[start : start + len(columns)]).any(dim=1)
        inside += int(found.sum())
    return inside / len(points)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """|x - y|^2 = |x|^2 - 2 x.y + |y|^2, at least 0, of (n, d) and (m, d): (n, m) float64."""
    rows, columns = rows.double(), columns.double()
    squares = torch.addmm(columns.square().sum(dim=1), rows, columns.T, alpha=-2)
    return squares.add_(rows.square().sum(dim=1, keepdim=True)).clamp_min_(0)


def _tiles(vectors: Tensor, size: int) -> list[tuple[int, Tensor]]:
    return [(start, vectors[start : start + size]) for start in range(0, len(vectors), size)]
