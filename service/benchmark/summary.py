"""Figures of a run: rates, latencies and stages, of all requests and of each entry of the mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from service.benchmark.load import Outcome
from service.metrics import STAGES

__all__ = ["REQUESTS_PER_CONCURRENCY", "compare", "percentiles", "saturated_images_per_s", "summarize"]

REQUESTS_PER_CONCURRENCY: Final = 8
"""Answers that a closed loop needs, times its concurrency. Of fewer, too many are those of the beginning,
when all requests are at the same step and short ones end first."""


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """`p50`, `p95`, `p99` and `mean`, linear between values; None of none."""
    if not values:
        return None
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    named = {"p50": p50, "p95": p95, "p99": p99, "mean": np.mean(values)}
    return {name: round(float(value), 4) for name, value in named.items()}


def summarize(outcomes: Sequence[Outcome], *, slo_s: float | None = None) -> dict[str, Any]:
    """All figures of a run: `overall`, `by_entry`, and how late the generator was (`send_lag_s`).

    `slo_s` holds for entries that have none of their own; without any, goodput is None.
    """
    duration_s = max((outcome.done_s for outcome in outcomes), default=0.0)
    entries = {outcome.entry.label: outcome.entry for outcome in outcomes}
    return {
        "duration_s": round(duration_s, 3),
        "send_lag_s": percentiles([outcome.sent_s - outcome.at_s for outcome in outcomes]),
        "overall": _figures(outcomes, duration_s, slo_s),
        "by_entry": {
            label: _figures(
                [outcome for outcome in outcomes if outcome.entry.label == label], duration_s, slo_s
            )
            for label in sorted(entries, key=lambda label: entries[label].steps)
        },
    }


def saturated_images_per_s(outcomes: Sequence[Outcome], concurrency: int) -> float:
    """Images a second of a closed loop while it was full: without the first and last `concurrency` answers.

    Raises ValueError for less than REQUESTS_PER_CONCURRENCY answers times `concurrency`.
    """
    done = sorted((outcome.done_s, outcome.entry.num_images) for outcome in outcomes if outcome.ok)
    needed = REQUESTS_PER_CONCURRENCY * concurrency
    if len(done) < needed:
        raise ValueError(
            f"requests: {len(done)} answered with a concurrency of {concurrency}; {needed} and more, "
            f"{REQUESTS_PER_CONCURRENCY} times the concurrency, are needed to measure a saturated server"
        )
    counted = done[concurrency : len(done) - concurrency]
    return sum(images for _, images in counted) / (counted[-1][0] - done[concurrency - 1][0])


def compare(runs: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Each policy over the reference at the same load: throughput when saturated, else latencies' p95."""
    rows: list[dict[str, Any]] = []
    by_load = {(run["policy"], run["share"]): run for run in runs}
    for (policy, share), run in by_load.items():
        base = by_load.get((reference, share))
        if policy == reference or base is None:
            continue
        row = {"policy": policy, "over": reference, "share": share}
        if share is None:
            row["throughput"] = _ratio(run["saturated_images_per_s"], base["saturated_images_per_s"])
        else:
            row["p95"] = _ratio(_p95(run["overall"]), _p95(base["overall"]))
            row["p95_by_entry"] = {
                label: _ratio(_p95(figures), _p95(base["by_entry"].get(label, {})))
                for label, figures in run["by_entry"].items()
            }
        rows.append(row)
    return rows


def _figures(outcomes: Sequence[Outcome], duration_s: float, slo_s: float | None) -> dict[str, Any]:
    made = [outcome for outcome in outcomes if outcome.ok]
    limits = [outcome.entry.slo_s or slo_s for outcome in outcomes]
    kept = [
        outcome
        for outcome, limit in zip(outcomes, limits, strict=True)
        if outcome.ok and limit is not None and outcome.latency_s <= limit
    ]
    has_slo = any(limit is not None for limit in limits)
    return {
        "requests": len(outcomes),
        "statuses": dict(sorted(Counter(outcome.status for outcome in outcomes).items())),
        "images_per_s": _rate(made, duration_s),
        "goodput_images_per_s": _rate(kept, duration_s) if has_slo else None,
        "slo_share": round(len(kept) / len(outcomes), 4) if has_slo else None,
        "latency_s": percentiles([outcome.latency_s for outcome in made]),
        "stages_s": {
            stage: percentiles([outcome.timings[stage] for outcome in made if stage in outcome.timings])
            for stage in STAGES
        },
    }


def _rate(outcomes: Sequence[Outcome], duration_s: float) -> float:
    images = sum(outcome.entry.num_images for outcome in outcomes)
    return round(images / duration_s, 4) if duration_s else 0.0


def _p95(figures: Mapping[str, Any]) -> float | None:
    latency = figures.get("latency_s")
    return latency["p95"] if latency else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return round(value / base, 4) if value is not None and base else None
