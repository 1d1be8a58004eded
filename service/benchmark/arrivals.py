"""When which request comes: decided before the run, so that no answer can delay it.

Bursts of n requests come as a Poisson process of rate r / n, so that r requests a second come on average;
with n = 1 the requests themselves are the Poisson process. Gaps, kinds and seeds have a random stream each:
the same seed at another rate asks for the same images in the same order, its gaps scaled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.benchmark.mix import MixEntry

__all__ = ["PlannedRequest", "burst_size", "plan_requests"]

_MAX_BURST = 10_000
_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """One request of a run."""

    at_s: float
    """When it comes, in seconds from the start of the run."""
    entry: MixEntry
    body: dict[str, Any]


def burst_size(arrivals: str) -> int:
    """Requests that come at once: 1 of "poisson", n of "burst:n". Raises ValueError for anything else."""
    match = re.fullmatch(r"poisson|burst:([1-9]\d*)", arrivals)
    size = int(match.group(1) or 1) if match else 0
    if not 1 <= size <= _MAX_BURST:
        raise ValueError(
            f"arrivals: {arrivals} given; poisson, or burst:N with N from 1 to {_MAX_BURST}, is accepted"
        )
    return size


def plan_requests(
    mix: Sequence[MixEntry],
    *,
    rate_per_s: float,
    num_requests: int,
    max_seconds: float = math.inf,
    burst: int = 1,
    seed: int = 0,
) -> list[PlannedRequest]:
    """Up to `num_requests` requests in order of arrival, none after `max_seconds`.

    A rate of infinity lets all of them come at once. Raises ValueError for a rate that is not above 0.
    """
    if not rate_per_s > 0:
        raise ValueError(f"rate: {rate_per_s:g} given; above 0 is accepted")
    gap_stream, kind_stream, seed_stream = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    gaps = gap_stream.standard_exponential(math.ceil(num_requests / burst)) * burst / rate_per_s
    arrivals = np.repeat(np.cumsum(gaps), burst)[:num_requests]
    weights = np.array([entry.weight for entry in mix])
    kinds = kind_stream.choice(len(mix), size=num_requests, p=weights / weights.sum())
    seeds = seed_stream.integers(_SEEDS, size=num_requests)
    return [
        PlannedRequest(at_s=float(at_s), entry=mix[kind], body=mix[kind].body(int(image_seed)))
        for at_s, kind, image_seed in zip(arrivals, kinds, seeds, strict=True)
        if at_s <= max_seconds
    ]
