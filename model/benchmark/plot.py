"""Time of a row against the number of rows and against resolution, drawn from a results file alone.

matplotlib draws it: it is the one library that writes a picture with logarithmic axes without a browser. It
is in the extra `bench` and is imported here alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.benchmark.summary import best, fits

__all__ = ["can_plot", "plot_forwards"]

_NAMES = {"lamamba": "LaMamba-Diff-{preset}", "dit": "DiT-{preset}/2"}
_COLORS = {"lamamba": "#c2410c", "dit": "#1d4ed8"}
_MARKERS = ("o", "s", "^", "D")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_forwards(content: Mapping[str, Any], path: Path) -> Path:
    """Write the two diagrams of a results file's forwards to `path` (PNG)."""
    import matplotlib as mpl

    mpl.use("Agg")  # writes files; no display is looked for
    from matplotlib import pyplot as plt

    rows = [row for row in content["results"] if row["scope"] == "forward"]
    sides = sorted({row["side"] for row in rows})
    preset = next((row["preset"] for row in rows), "")
    figure, (by_rows, by_side) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    for provider, color in _COLORS.items():
        name = _NAMES[provider].format(preset=preset)
        lines = {side: _points(rows, provider, side) for side in sides}
        for (side, points), marker in zip(lines.items(), _MARKERS, strict=False):
            if points:
                label = f"{name}, {side}x{side}"
                style = "-" if provider == "lamamba" else "--"
                by_rows.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=label)
        fastest = [(side, min(ms for _, ms in points)) for side, points in lines.items() if points]
        if fastest:
            exponent = next(
                (
                    fit["exponent"]
                    for fit in fits(rows)
                    if (fit["provider"], fit["rows"]) == (provider, "best")
                ),
                None,
            )
            label = name + (f": L^{exponent:.2f}" if exponent is not None else "")
            lengths = [side**2 for side, _ in fastest]
            by_side.plot(lengths, [ms for _, ms in fastest], color=color, marker="o", label=label)
    _finish(by_rows, "rows of a batch", sorted({row["rows"] for row in rows}), [])
    lengths = [side**2 for side in sides]
    _finish(by_side, "L, latent positions (image)", lengths, [f"{8 * side} px" for side in sides])
    by_side.set_title("fastest number of rows", fontsize=10)
    by_rows.set_title("best variant at each shape", fontsize=10)
    environment = content["environment"]
    figure.suptitle(
        f"One forward, {rows[0]['numerics'] if rows else ''}, {environment.get('gpu', environment['cpu'])}",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _points(rows: Sequence[Mapping[str, Any]], provider: str, side: int) -> list[tuple[int, float]]:
    """(rows, ms a row) of one side."""
    numbers = sorted({row["rows"] for row in rows if row["side"] == side})
    found = ((number, best(rows, provider, number, side)) for number in numbers)
    return [(number, row["ms"] / number) for number, row in found if row is not None]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between `low` and `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _finish(axes: Any, label: str, ticks: Sequence[int], names: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    texts = [f"{tick:,}\n({name})" for tick, name in zip(ticks, names, strict=True)] if names else ticks
    axes.set_xticks(ticks, [str(text) for text in texts])
    axes.set_yticks(_ticks(*axes.get_ylim()))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("ms a row")
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
