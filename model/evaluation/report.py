"""evaluation.json: numbers, each with all that it depends on."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.evaluation.features import FeatureExtractor
from model.evaluation.manifold import NEIGHBOUR
from model.evaluation.measure import Measured, metrics
from model.evaluation.ranks import Ranks
from model.evaluation.sources import ImageSet, NpzImages
from model.whole_file import write_json

__all__ = ["Report", "figures", "file_source", "require_enough_images", "shown"]

logger = logging.getLogger(__name__)

_FILE = "evaluation.json"
_SIGNIFICANT_DIGITS = 8


class Report:
    """What one evaluation has found so far, complete on rank 0; `fields` is the JSON."""

    def __init__(self, output_dir: Path, *, ranks: Ranks, device: torch.device) -> None:
        self.path, self.ranks = output_dir / _FILE, ranks
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.fields: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": name,
            "num_ranks": ranks.size,
            "torch": torch.__version__,
            "metrics": [],
            "seconds": {},
        }

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the evaluation and write the file after it."""
        started = time.perf_counter()
        yield
        seconds = self.fields["seconds"][name] = round(time.perf_counter() - started, 2)
        if self.ranks.is_main:
            write_json(self.path, self.fields)
            logger.info("%s: %.1f s", name, seconds)

    def add_metrics(
        self,
        measured: Measured,
        reference: Measured,
        extractors: Sequence[FeatureExtractor],
        *,
        description: dict[str, Any],
        source: dict[str, Any],
    ) -> None:
        """Every extractor's metrics of one set of images; `description` is the reference's, `source` says
        where the images come from and what they were made with.
        """
        pairs = zip(extractors, measured.summaries, reference.summaries, strict=True)
        for extractor, summary, reference_summary in pairs:
            for row in metrics(summary, reference_summary, extractor):
                count = row.pop("num_reference_images")
                value, error = _rounded(row["value"]), row["standard_error"]
                error = None if error is None else _rounded(error)
                full = {
                    **row,
                    "value": value,
                    "standard_error": error,
                    "reference": {**description, "num_images": count} if count != 0 else None,
                    "extractor": {
                        "name": extractor.name,
                        "details": extractor.details,
                        "weights": extractor.weights_hash,
                    },
                    **source,
                }
                self.fields["metrics"].append({key: v for key, v in full.items() if v is not None})
                logger.info("%s: %s %s", shown(source), row["metric"], _with_error(value, error))


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g}" if error is None else f"{value:.5g} ± {error:.2g}"


def figures(fields: dict[str, Any]) -> dict[str, str]:
    """The metrics of an evaluation.json's `fields` as a model card shows them: a name and a value each."""
    return {
        f"{row['metric']}, {shown(row)}": _with_error(row["value"], row.get("standard_error"))
        for row in fields["metrics"]
    }


def shown(source: dict[str, Any]) -> str:
    """A set of images, in a line of the log."""
    scale = source.get("guidance_scale")
    return source["images"] if scale is None else f"{source['images']} at guidance {scale:g}"


def file_source(samples: NpzImages) -> dict[str, Any]:
    """Where a file's images come from: what the record beside it says, which generation writes, if any."""
    try:
        record = dict(json.loads(samples.path.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        record = {}
    description = samples.description
    return {
        "images": description["name"],
        "hash": description["hash"],
        "resolution": samples.size,
        **{key: value for key, value in record.items() if key not in ("num", "images_per_part")},
    }


def require_enough_images(
    extractors: Sequence[FeatureExtractor], num: int, reference: ImageSet, *, field: str = "num"
) -> None:
    """ValueError for an FID of fewer images than it has features, for fewer than precision and recall need,
    and for published statistics of other features; a warning for other distances of so few.

    The covariance of fewer vectors than features is singular, and the distance far too large.
    """
    for side, count in {field: num, "reference": reference.num}.items():
        if count <= NEIGHBOUR:
            raise ValueError(f"{side}: {count} images given; at least {NEIGHBOUR + 1} are accepted")
    published = reference.published_statistics() if isinstance(reference, NpzImages) else None
    for extractor in extractors:
        sides = {field: num}
        if published is None or not extractor.defines_fid:
            sides["reference"] = reference.num
        elif len(published[0].mean) != extractor.num_features:
            raise ValueError(
                f"reference: {reference.description['name']} has statistics of {len(published[0].mean)} "
                f"features; those of {extractor.name}, {extractor.num_features}, are accepted"
            )
        for side, count in sides.items():
            if count >= extractor.num_features:
                continue
            if extractor.defines_fid:
                raise ValueError(
                    f"{side}: {count} images given; at least {extractor.num_features} are accepted with "
                    f"{extractor.name}: the covariance of fewer is singular"
                )
            logger.warning(
                "%s: %d images for the %d features of %s: a distance to compare with that of equally many "
                "images alone",
                side,
                count,
                extractor.num_features,
                extractor.name,
            )
