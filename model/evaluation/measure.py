"""Measuring a set of images: what each extractor's metrics need of it, and the judge's verdicts, in one pass.

The set is shared out over the ranks, streamed, and summed up on rank 0. Numbers between two sets are
`metrics`: for Inception FID, sFID, Inception Score, precision and recall, exactly as ADM defines them; for
every other extractor a Frechet distance, precision and recall under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.evaluation.features import FeatureExtractor, Features
from model.evaluation.frechet import FeatureStatistics, StatisticsStream
from model.evaluation.inception_score import InceptionScoreStream
from model.evaluation.jackknife import distance_error
from model.evaluation.judge import Confusion, Judge
from model.evaluation.manifold import precision_and_recall
from model.evaluation.ranks import Ranks
from model.evaluation.sources import ImageSet, NpzImages

__all__ = ["MAX_REFERENCE_VECTORS", "FeatureSummary", "Measured", "measure", "measure_reference", "metrics"]

MAX_REFERENCE_VECTORS = 10_000
"""References that precision and recall look at, the first of their set: ADM's files hold so many images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSummary:
    """One extractor's view of a set of images."""

    statistics: FeatureStatistics
    spatial: FeatureStatistics | None
    inception_score: float | None
    vectors: Tensor
    """(n, d) fp32 on the CPU: pooled features, in the images' order."""
    spatial_vectors: Tensor | None
    """(n, d') fp32 on the CPU, of the same images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What rank 0 knows of a set of images."""

    summaries: tuple[FeatureSummary, ...]
    """One for each extractor."""
    confusion: Confusion | None


class _FeatureStream:
    """One rank's sums for one extractor."""

    def __init__(self) -> None:
        self.pooled, self.spatial = StatisticsStream(), StatisticsStream()
        self.scores: InceptionScoreStream | None = None
        self.vectors: list[Tensor] = []
        self.spatial_vectors: list[Tensor] = []

    def add(self, first: int, features: Features, *, keep: int) -> None:
        """Take in the features of images from the number `first` on; of those below `keep`, vectors stay."""
        kept = max(0, keep - first)
        self.pooled.add(features.pooled)
        self.vectors.append(features.pooled[:kept].cpu())
        if features.spatial is not None:
            self.spatial.add(features.spatial)
            self.spatial_vectors.append(features.spatial[:kept].cpu())
        if features.probabilities is not None:
            self.scores = self.scores or InceptionScoreStream()
            self.scores.add(first, features.probabilities)

    def cpu(self) -> _FeatureStream:
        """This stream, ready to travel."""
        self.pooled.cpu()
        self.spatial.cpu()
        self.vectors, self.spatial_vectors = _joined(self.vectors), _joined(self.spatial_vectors)
        return self

    def merge(self, other: _FeatureStream) -> None:
        """Take in the sums of the next rank."""
        self.pooled.merge(other.pooled)
        self.spatial.merge(other.spatial)
        if self.scores is not None and other.scores is not None:
            self.scores.merge(other.scores)
        else:
            self.scores = self.scores or other.scores
        self.vectors += other.vectors
        self.spatial_vectors += other.spatial_vectors

    def summary(self) -> FeatureSummary:
        return FeatureSummary(
            statistics=self.pooled.statistics(),
            spatial=self.spatial.statistics() if self.spatial.count else None,
            inception_score=None if self.scores is None else self.scores.score(),
            vectors=torch.cat(self.vectors),
            spatial_vectors=torch.cat(self.spatial_vectors) if self.spatial_vectors else None,
        )


def measure(
    images: ImageSet,
    extractors: Sequence[FeatureExtractor],
    *,
    ranks: Ranks,
    judge: Judge | None = None,
    max_vectors: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Measured | None:
    """Look at every image once, together with the other ranks; None on all but rank 0.

    Args:
        max_vectors: images whose features are kept, from the first on; None keeps all.
        advance: called with the number of images just seen by this rank.
    """
    streams = [_FeatureStream() for _ in extractors]
    confusion = None if judge is None else Confusion(judge.labels)
    share = ranks.share(images.num)
    first, keep = share.start, images.num if max_vectors is None else max_vectors
    for pixels, labels in images.batches(share):
        if judge is not None and confusion is not None:
            confusion.add(labels, judge.classify(pixels))
        for extractor, stream in zip(extractors, streams, strict=True):
            stream.add(first, extractor(pixels), keep=keep)
        first += len(pixels)
        if advance is not None:
            advance(len(pixels))
    everything = ranks.gathered(([stream.cpu() for stream in streams], confusion))
    if not everything:
        return None
    (streams, confusion), *others = everything
    for other_streams, other_confusion in others:
        for stream, other in zip(streams, other_streams, strict=True):
            stream.merge(other)
        if confusion is not None and other_confusion is not None:
            confusion.counts += other_confusion.counts
    return Measured(summaries=tuple(stream.summary() for stream in streams), confusion=confusion)


def measure_reference(
    images: ImageSet,
    extractors: Sequence[FeatureExtractor],
    *,
    ranks: Ranks,
    judge: Judge | None = None,
    advance: Callable[[int], None] | None = None,
) -> Measured | None:
    """`measure` of what others are compared with: Inception's statistics are the published ones where the
    file has them.
    """
    measured = measure(
        images, extractors, ranks=ranks, judge=judge, max_vectors=MAX_REFERENCE_VECTORS, advance=advance
    )
    published = images.published_statistics() if isinstance(images, NpzImages) else None
    if measured is None or published is None:
        return measured
    pooled, spatial = published
    summaries = [
        replace(summary, statistics=pooled, spatial=spatial) if extractor.defines_fid else summary
        for extractor, summary in zip(extractors, measured.summaries, strict=True)
    ]
    return Measured(summaries=tuple(summaries), confusion=measured.confusion)


def metrics(
    samples: FeatureSummary, reference: FeatureSummary, extractor: FeatureExtractor
) -> list[dict[str, Any]]:
    """Rows of `metric`, `value`, how many images it is of on both sides (None: not published), and of a
    distance its `standard_error` (None of the others).

    A distance's name ends with the number of samples, on which it depends.
    """
    num, num_references = len(samples.vectors), len(reference.vectors)
    vectors = samples.vectors.to(extractor.device)
    precision, recall = precision_and_recall(reference.vectors.to(extractor.device), vectors)
    distance, error = _distance_with_error(samples.statistics, vectors, reference.statistics)
    rows: list[tuple[str, float, float | None, int | None]]
    if extractor.defines_fid:
        rows = [(f"FID-{_short(num)}", distance, error, reference.statistics.count)]
        if (
            samples.spatial is not None
            and samples.spatial_vectors is not None
            and reference.spatial is not None
        ):
            vectors = samples.spatial_vectors.to(extractor.device)
            spatial = _distance_with_error(samples.spatial, vectors, reference.spatial)
            rows.append((f"sFID-{_short(num)}", *spatial, reference.spatial.count))
        if samples.inception_score is not None:
            rows.append(("Inception Score", samples.inception_score, None, 0))
        rows += [("Precision", precision, None, num_references), ("Recall", recall, None, num_references)]
    else:
        name = f"Frechet distance ({extractor.name})-{_short(num)}"
        rows = [
            (name, distance, error, reference.statistics.count),
            (f"Precision ({extractor.name})", precision, None, num_references),
            (f"Recall ({extractor.name})", recall, None, num_references),
        ]
    return [
        {
            "metric": name,
            "value": value,
            "standard_error": error,
            "num_images": num,
            "num_reference_images": count,
        }
        for name, value, error, count in rows
    ]


def _distance_with_error(
    statistics: FeatureStatistics, vectors: Tensor, reference: FeatureStatistics
) -> tuple[float, float]:
    """The distance of the `statistics` of `vectors` and its standard error, on the vectors' device."""
    device = vectors.device
    distance = statistics.to(device).distance(reference.to(device))
    return distance, distance_error(vectors, reference)


def _joined(vectors: list[Tensor]) -> list[Tensor]:
    """As one tensor, which travels faster than many; none of none."""
    return [torch.cat(vectors)] if vectors else []


def _short(num: int) -> str:
    """50000 as 50K, 2048 as it is."""
    return f"{num // 1000}K" if num % 1000 == 0 else str(num)
