"""Times of several functions, sampled in turn.

A sample is a number of calls between two CUDA events (on a CPU, between two readings of the clock), after one
call that is not timed. Round by round every function gives one sample, so that a clock that drifts, or a
neighbour that wakes up, meets all of them alike. Reported are the median and the 20th and 80th percentiles.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from model.messages import one_line

__all__ = ["Run", "Samples", "interleaved", "milliseconds", "percentiles", "release"]

Run = Callable[[], object]
Milliseconds = Callable[[Run, int], float]

MIN_REPEATS = 3
# A sample of a short function is of several calls: a launch takes some 10 us, of which only the first call's
# is not hidden behind the one before.
_SAMPLE_MS = 10.0
_MAX_CALLS = 20


@dataclass
class Samples:
    """Milliseconds a call, one number a sample, and how many calls a sample is of."""

    calls: int
    ms: list[float] = field(default_factory=list)


def milliseconds(device: torch.device) -> Milliseconds:
    """What measures `calls` calls on `device`, in milliseconds a call."""
    return _cuda_milliseconds if device.type == "cuda" else _host_milliseconds


def interleaved(
    runs: Mapping[str, Run],
    measure: Milliseconds,
    *,
    repeats: int,
    variant_limit_s: float = math.inf,
    deadline: float = math.inf,
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Up to `repeats` samples of each of `runs`, round by round, and why those failed that did.

    Args:
        measure: as `milliseconds` gives it.
        variant_limit_s: no further samples of a function whose samples took longer, but at least 3 (fewer if
            `repeats` is less).
        deadline: of `time.monotonic`; after it no further round, but again at least 3.
    """
    samples: dict[str, Samples] = {}
    failures: dict[str, str] = {}
    spent = dict.fromkeys(runs, 0.0)
    for number in range(-1, repeats):
        if number >= MIN_REPEATS and time.monotonic() > deadline:
            break
        for name, run in runs.items():
            if name in failures or (number >= MIN_REPEATS and spent[name] > variant_limit_s):
                continue
            started = time.monotonic()
            try:
                run()  # what ran before was another function
                if number < 0:
                    calls = math.ceil(_SAMPLE_MS / max(measure(run, 1), _SAMPLE_MS / _MAX_CALLS))
                    samples[name] = Samples(calls)
                else:
                    samples[name].ms.append(measure(run, samples[name].calls))
            except Exception as error:  # out of memory, or whatever a kernel or a compiler fails with
                failures[name] = one_line(error)
                samples.pop(name, None)
            spent[name] += time.monotonic() - started
    return samples, failures


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """`ms`, the median, with `ms_p20` and `ms_p80`."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    named = {"ms": statistics.median(values), "ms_p20": low, "ms_p80": high}
    return {name: round(value, 4) for name, value in named.items()}


def release(device: torch.device) -> None:
    """Give memory of a CUDA device that nothing uses back to it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _cuda_milliseconds(run: Run, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _host_milliseconds(run: Run, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e3 * (time.perf_counter() - started) / calls
