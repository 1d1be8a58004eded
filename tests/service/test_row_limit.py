"""service/engine/row_limit.py: if this fails, a full device stays slow for good, or fails again and again."""

from __future__ import annotations

from service.engine.row_limit import GOOD_STEPS, RowLimit


def good_steps(limit: RowLimit, count: int) -> None:
    for _ in range(count):
        limit.count_good_step()


def test_half_of_the_rows_that_did_not_fit_are_the_limit() -> None:
    limit = RowLimit(128)
    limit.shrink(128)
    assert limit.value == 64
    limit.shrink(10)  # a step of few images: half of the limit would not help
    assert limit.value == 5
    for _ in range(5):
        limit.shrink(limit.value)
    assert limit.value == 1


def test_the_limit_grows_slowly_and_to_the_full_one_alone() -> None:
    limit = RowLimit(128)
    limit.shrink(128)
    good_steps(limit, GOOD_STEPS - 1)
    assert limit.value == 64
    good_steps(limit, 1)
    assert limit.value == 72
    good_steps(limit, 7 * GOOD_STEPS)
    assert limit.value == 128
    good_steps(limit, 10 * GOOD_STEPS)
    assert limit.value == 128


def test_a_failure_begins_the_count_anew() -> None:
    limit = RowLimit(8)
    limit.shrink(8)
    good_steps(limit, GOOD_STEPS - 1)
    limit.shrink(4)
    good_steps(limit, GOOD_STEPS - 1)
    assert limit.value == 2
    good_steps(limit, 1)
    assert limit.value == 3
