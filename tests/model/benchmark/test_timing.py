"""Interleaved samples: if this fails, one variant may be timed while the card is colder than for another."""

from __future__ import annotations

import math
import time

import pytest

from model.benchmark.timing import Run, interleaved, percentiles


class Meter:
    """A measure that runs the function and reads its time from a table, without a clock."""

    def __init__(self, ms: dict[str, float]) -> None:
        self.ms = ms
        self.log: list[str] = []

    def run_of(self, name: str) -> Run:
        return lambda: self.log.append(name)

    def __call__(self, run: Run, calls: int) -> float:
        for _ in range(calls):
            run()
        return self.ms[self.log[-1]]


def runs(meter: Meter) -> dict[str, Run]:
    return {name: meter.run_of(name) for name in meter.ms}


def test_variants_take_turns_and_each_turn_starts_with_an_untimed_call() -> None:
    meter = Meter({"a": 20.0, "b": 30.0})
    samples, failures = interleaved(runs(meter), meter, repeats=3)
    assert failures == {}
    assert meter.log == ["a", "a", "b", "b"] * 4  # a first round only finds the number of calls
    assert samples["a"].ms == [20.0] * 3
    assert (samples["a"].calls, samples["b"].calls) == (1, 1)


def test_short_functions_are_called_more_often_a_sample() -> None:
    meter = Meter({"long": 11.0, "short": 3.0, "shortest": 0.01})
    samples, _ = interleaved(runs(meter), meter, repeats=1)
    assert [samples[name].calls for name in ("long", "short", "shortest")] == [1, 4, 20]


def test_a_failure_is_a_reason_and_ends_only_its_own_variant() -> None:
    meter = Meter({"a": 20.0, "b": 30.0})
    calls = 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("out of\nmemory")

    samples, failures = interleaved({"bad": failing, **runs(meter)}, lambda run, n: run() or 20.0, repeats=4)
    assert failures == {"bad": "out of memory"}
    assert samples.keys() == {"a", "b"}
    assert len(samples["b"].ms) == 4


def test_no_more_than_three_samples_after_the_limits() -> None:
    meter = Meter({"a": 20.0, "b": 30.0})
    samples, _ = interleaved(runs(meter), meter, repeats=9, variant_limit_s=-1.0)
    assert [len(sample.ms) for sample in samples.values()] == [3, 3]
    samples, _ = interleaved(runs(meter), meter, repeats=9, deadline=time.monotonic() - 1.0)
    assert [len(sample.ms) for sample in samples.values()] == [3, 3]


def test_percentiles() -> None:
    values = percentiles([float(value) for value in range(11)])
    assert values == {"ms": 5.0, "ms_p20": 2.0, "ms_p80": 8.0}
    assert percentiles([4.0]) == {"ms": 4.0, "ms_p20": 4.0, "ms_p80": 4.0}
    assert math.isclose(percentiles([1.0, 2.0])["ms"], 1.5)


def test_percentiles_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="data"):
        percentiles([])
