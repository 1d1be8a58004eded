"""What the rows of a results file say: the best variants side by side, goals, and growth with resolution.

Reads rows alone, so that a table or a plot can be made again, anywhere, from a file. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = ["best", "comparison", "fits", "fitted_exponent", "forward_table", "join", "read", "summary"]

Row = Mapping[str, Any]

# Rows x side: DiT's time over ours, and our milliseconds on one H100 80GB.
GOALS = {
    (2, 32): (1.25, 1.75),
    (16, 32): (1.6, 5.25),
    (128, 32): (1.8, 35.5),
    (16, 64): (2.1, 17.3),
    (2, 128): (3.1, 9.0),
}


def best(rows: Sequence[Row], provider: str, num_rows: int, side: int) -> Row | None:
    """The fastest variant of a forward, of "lamamba" or "dit" (of any size); None if none was timed."""
    timed = [
        row
        for row in rows
        if row["scope"] == "forward"
        and _is_of(row, provider)
        and (row["rows"], row["side"]) == (num_rows, side)
        and row.get("run", 0) == _deciding_run(rows, num_rows, side)
        and "ms" in row
    ]
    return min(timed, key=lambda row: row["ms"], default=None)


def comparison(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row a shape: both best variants and times, DiT's over ours, and the goals where XL has one."""
    table = []
    for num_rows, side in _shapes(rows):
        ours, peer = (best(rows, provider, num_rows, side) for provider in ("lamamba", "dit"))
        entry: dict[str, Any] = {"rows": num_rows, "side": side}
        for name, row in (("lamamba", ours), ("dit", peer)):
            if row is not None:
                entry[name] = {key: row[key] for key in ("variant", "ms", "share_of_matmul_ceiling")}
        if ours is not None and peer is not None and ours["ms"] > 0:
            entry["ratio"] = round(peer["ms"] / ours["ms"], 3)
        goal = GOALS.get((num_rows, side))
        if goal is not None and any(row["scope"] == "forward" and row["preset"] == "XL" for row in rows):
            entry["goal_ratio"], entry["goal_ms"] = goal
        table.append(entry)
    return table


def fits(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How the time of a row grows with L = side^2: an exponent for each provider, from the fastest rows of
    each side, and one more for each number of rows that was measured at several sides.

    `macs_exponent` is the same fit through the multiply-adds: 1 of a network of linear cost.
    """
    results = []
    for provider in ("lamamba", "dit"):
        points: dict[int, dict[int, tuple[float, float]]] = {}  # rows: side: (ms a row, GMACs a row)
        for num_rows, side in _shapes(rows):
            row = best(rows, provider, num_rows, side)
            if row is not None:
                points.setdefault(num_rows, {})[side] = (row["ms"] / num_rows, row["gmacs_per_row"])
        fastest: dict[int, tuple[float, float]] = {}
        for sides in points.values():
            for side, point in sides.items():
                fastest[side] = min(point, fastest.get(side, point))
        by_rows: dict[int | str, dict[int, tuple[float, float]]] = {"best": fastest}
        by_rows |= dict(points.items())
        for name, sides in by_rows.items():
            if len(sides) > 1:
                lengths = [side**2 for side in sides]
                results.append(
                    {
                        "provider": provider,
                        "rows": name,
                        "sides": sorted(sides),
                        "exponent": fitted_exponent(lengths, [ms for ms, _ in sides.values()]),
                        "macs_exponent": fitted_exponent(lengths, [macs for _, macs in sides.values()]),
                    }
                )
    return results


def fitted_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of y = a x^b, by least squares on logarithms."""
    log_x, log_y = [math.log(value) for value in x], [math.log(max(value, 1e-9)) for value in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return round(covariance / sum((a - mean_x) ** 2 for a in log_x), 4)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What a results file says beside its rows."""
    return {"comparison": comparison(rows), "fits": fits(rows)}


def forward_table(rows: Sequence[Row]) -> Table:
    """`comparison` for the terminal."""
    table = Table(title="One forward: the best of ours beside the best of DiT", title_justify="left")
    left, right = ("rows x side", "ours", "DiT"), ("ms", "of ceiling")
    for column in ("rows x side", "ours", *right, "DiT", *right, "DiT / ours", "goal"):
        table.add_column(column, justify="left" if column in left else "right")
    for entry in comparison(rows):
        cells = [f"{entry['rows']} x {entry['side']}"]
        for provider in ("lamamba", "dit"):
            row = entry.get(provider)
            cells += (
                [row["variant"], f"{row['ms']:.3f}", f"{row['share_of_matmul_ceiling']:.0%}"]
                if row
                else ["-", "-", "-"]
            )
        cells.append(f"{entry['ratio']:.2f}x" if "ratio" in entry else "-")
        cells.append(f"{entry['goal_ratio']:.2f}x, {entry['goal_ms']:g} ms" if "goal_ratio" in entry else "-")
        table.add_row(*cells)
    return table


def read(path: Path) -> dict[str, Any]:
    """A results file. Raises ValueError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["results"]
        if not all({"provider", "variant", "scope", "rows", "side"} <= row.keys() for row in rows):
            raise KeyError("provider, variant, scope, rows, side")
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"file: {path} given; results of `lamamba bench model` are accepted ({error})"
        ) from error
    return dict(content)


def join(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs on one kind of card as one file: `environment` is the first's, `further_runs` the others',
    and each row names its run, counted from 0.

    A row that was not timed is left out where another run timed it. Raises ValueError for runs on different
    cards.
    """
    cards = {content["environment"].get("gpu") for content in contents}
    if len(cards) > 1:
        raise ValueError(f"file: runs on {', '.join(map(str, cards))} given; runs on one card are accepted")
    every = [{**row, "run": number} for number, content in enumerate(contents) for row in content["results"]]
    timed = {_key(row) for row in every if "ms" in row}
    rows = [row for row in every if "ms" in row or _key(row) not in timed]
    return {
        "environment": contents[0]["environment"],
        "further_runs": [content["environment"] for content in contents[1:]],
        "results": rows,
        "summary": summary(rows),
    }


def _key(row: Row) -> tuple[Any, ...]:
    """What is measured in a row, whichever run it is of."""
    names = ("scope", "preset", "provider", "variant", "d_state", "rows", "side", "length")
    return tuple(row.get(name) for name in names)


def _deciding_run(rows: Sequence[Row], num_rows: int, side: int) -> int:
    """Of several runs that timed a shape, the first with the most providers: a ratio is always of one run."""
    providers: dict[int, set[str]] = {}
    for row in rows:
        if row["scope"] == "forward" and (row["rows"], row["side"]) == (num_rows, side) and "ms" in row:
            providers.setdefault(row.get("run", 0), set()).add(row["provider"])
    return min(providers, key=lambda run: (-len(providers[run]), run), default=0)


def _shapes(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(rows, side) of the forwards, by side, then by rows."""
    shapes = {(row["side"], row["rows"]) for row in rows if row["scope"] == "forward"}
    return [(num_rows, side) for side, num_rows in sorted(shapes)]


def _is_of(row: Row, provider: str) -> bool:
    return str(row["provider"]).split("-")[0] == provider
