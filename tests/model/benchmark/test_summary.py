"""Tables and fits from rows: if this fails, the ratios that documents quote are not those measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.benchmark.summary import best, comparison, fits, fitted_exponent, join, read


def row(provider: str, variant: str, rows: int, side: int, ms: float | None, **more: Any) -> dict[str, Any]:
    timed = {"ms": ms} if ms is not None else {"skipped": "out of memory"}
    return {
        "provider": provider,
        "preset": "XL",
        "variant": variant,
        "scope": "forward",
        "rows": rows,
        "side": side,
        "gmacs_per_row": side**2 / 1e3,
        "share_of_matmul_ceiling": 0.5,
        **timed,
        **more,
    }


ROWS = [
    row("lamamba", "triton/eager", 2, 32, 9.0),
    row("lamamba", "triton/compile-blocks+graph", 2, 32, 2.0),
    row("lamamba", "vectorized/eager", 2, 32, None),
    row("dit-xl-2", "eager", 2, 32, 7.0),
    row("dit-xl-2", "one-embedding/compile+graph", 2, 32, 2.5),
    row("lamamba", "triton/eager", 2, 128, 32.0),
    row("dit-xl-2", "eager", 2, 128, 80.0),
    row("mamba-ssm", "selective_scan_fn", 2, 32, 0.1, scope="scan"),
]


def test_best_variants_their_ratio_and_the_goal() -> None:
    table = comparison(ROWS)
    assert [(entry["rows"], entry["side"]) for entry in table] == [(2, 32), (2, 128)]
    assert table[0]["lamamba"]["variant"] == "triton/compile-blocks+graph"
    assert table[0]["dit"]["variant"] == "one-embedding/compile+graph"
    assert (table[0]["ratio"], table[0]["goal_ratio"], table[0]["goal_ms"]) == (1.25, 1.25, 1.75)
    assert table[1]["ratio"] == 2.5
    assert best(ROWS, "dit", 16, 32) is None


def test_exponents() -> None:
    assert fitted_exponent([1.0, 4.0, 16.0], [3.0, 6.0, 12.0]) == 0.5
    entries = {(fit["provider"], fit["rows"]): fit for fit in fits(ROWS)}
    assert entries["lamamba", "best"]["exponent"] == 1.0  # 16 times the positions, 16 times the time
    assert entries["dit", 2]["exponent"] == 1.25
    assert entries["dit", 2]["macs_exponent"] == 1.0
    assert entries["lamamba", "best"]["sides"] == [32, 128]


def run(rows: list[dict[str, Any]], gpu: str = "card") -> dict[str, Any]:
    return {"environment": {"gpu": gpu}, "results": rows}


def test_joined_runs_keep_each_row_and_take_ratios_from_one_run() -> None:
    first = run([row("lamamba", "triton/eager", 2, 32, 4.0), row("dit-xl-2", "eager", 2, 32, 8.0)])
    first["results"].append(row("lamamba", "triton/eager", 2, 64, None))
    second = run([row("lamamba", "triton/eager", 2, 32, 1.0), row("lamamba", "triton/eager", 2, 64, 5.0)])
    content = join([first, second])
    assert [entry["run"] for entry in content["results"]] == [0, 0, 1, 1]
    assert len(content["further_runs"]) == 1
    assert content["summary"]["comparison"][0]["ratio"] == 2.0
    assert content["summary"]["comparison"][1]["lamamba"]["ms"] == 5.0


def test_runs_on_two_cards_are_not_joined() -> None:
    with pytest.raises(ValueError, match="one card"):
        join([run([]), run([], gpu="another")])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("{", "[]", json.dumps({"results": [{"provider": "x"}]})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"other\.json given"):
            read(path)
