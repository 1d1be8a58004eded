"""service/metrics.py: if this fails, autoscalers see a rate that is not there."""

from __future__ import annotations

import pytest

from service.metrics import RateWindow


def test_rate_window_forgets_what_is_older_than_the_window() -> None:
    now = [100.0]
    window = RateWindow(60.0, clock=lambda: now[0])
    assert window.per_second() == 0.0
    for _ in range(10):
        window.add()
    assert window.per_second() == 10.0  # never a rate over less than a second
    now[0] += 20.0
    assert window.per_second() == pytest.approx(0.5)
    now[0] += 30.0
    for _ in range(5):
        window.add()
    now[0] += 30.0
    assert window.per_second() == pytest.approx(5 / 60)
