"""benchmarks/training.py: if this fails, a network that did not run, or did not learn, could be compared."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import comparison, did_not_fit, measure, plot_log


def timed(name: str, images_per_second: float, **facts: Any) -> dict[str, Any]:
    shared = {"compile": "full", "cuda_graph": True, "batch_size": 128, "mfu": 0.2, "peak_memory_gib": 60.0}
    return shared | {"name": name, "wall_ms": 1.0, "images_per_second": images_per_second} | facts


def test_the_best_rows_are_compared() -> None:
    failed = {"name": "XL", "failed": "exit code 1"}
    rows = [
        timed("XL", 300.0),
        timed("XL", 450.0),
        failed,
        timed("dit-xl-2", 290.0),
        timed("dit-xl-2", 300.0),
    ]
    compared = comparison(rows)
    assert compared["ratios"] == {"XL": 1.5}
    assert compared["best"]["XL"]["images_per_second"] == 450.0


def test_there_is_no_ratio_without_a_peer() -> None:
    compared = comparison([timed("XL", 300.0), {"name": "dit-xl-2", "failed": "over 10 s"}])
    assert compared["ratios"] == {}


def test_a_runs_log_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = [{"images": 100 * n, "loss": 1 / n, "images_per_second": 700.0} for n in (1, 2, 3)]
    content = {"environment": {"gpu": "a GPU"}, "results": {"log": log, "stops": []}}
    straight = plot_log(content, tmp_path / "straight.png").read_bytes()
    content["results"]["stops"] = [{"images": 150, "signal": "SIGTERM"}]
    stopped = plot_log(content, tmp_path / "stopped.png").read_bytes()
    assert straight.startswith(b"\x89PNG")
    assert straight != stopped, "the stop is not marked"


def test_only_a_case_without_any_time_did_not_fit() -> None:
    full = {"name": "XL", "failed": "CUDA out of memory", "out_of_memory": True}
    assert did_not_fit([full, full])
    assert not did_not_fit([full, timed("XL", 300.0)])
    assert not did_not_fit([{"name": "XL", "failed": "exit code 1"}])


@pytest.mark.parametrize("name", ["tiny", "dit-tiny-2"])
def test_both_networks_train_in_the_trainers_loop(name: str) -> None:
    arguments = Namespace(networks=[name], device="cpu", side=8, steps=1, profile=True)
    (row,) = measure(arguments, name, "none", 2)
    assert row.get("failed") is None
    assert row["batch_size"] == 2
    assert 0 < len(row["profile"]["kernels"]) <= 40
    losses = row["losses_of_5_steps"]
    assert len(set(losses)) == 5
    assert all(0.5 < loss < 5 for loss in losses)  # eps's 1 and the bound's
