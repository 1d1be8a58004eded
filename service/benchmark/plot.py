"""Latencies of one run, and of several servers over the offered load, drawn from a results file alone.

matplotlib is in the extra `bench` and is imported here alone (`model.benchmark.plot.can_plot`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["finish", "plot_comparison", "plot_run", "pyplot", "save"]

_COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#525252")


def plot_run(content: Mapping[str, Any], path: Path) -> Path:
    """Write the distribution of latencies, one line an entry of the mix, to `path` (PNG)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for label in content["run"]["by_entry"]:
        latencies = sorted(
            request["latency_s"]
            for request in content["requests"]
            if request["entry"] == label and request["status"] == "200"
        )
        if latencies:
            shares = [100 * (rank + 1) / len(latencies) for rank in range(len(latencies))]
            axes.step(latencies, shares, where="post", label=f"{label} ({len(latencies)})")
    axes.set_xlabel("latency, s")
    axes.set_ylabel("% of answered requests")
    axes.set_ylim(0, 100)
    finish(axes)
    return save(figure, content["environment"], path)


def plot_comparison(content: Mapping[str, Any], path: Path) -> Path:
    """Write p50 and p95 over the offered load, of all requests and of the shortest entry, to `path` (PNG)."""
    plt = pyplot()
    runs: Sequence[Mapping[str, Any]] = content["runs"]
    policies = list(dict.fromkeys(run["policy"] for run in runs))
    shortest = next((label for run in runs for label in run["by_entry"]), "")
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained", sharey=True)
    for policy, color in zip(policies, _COLORS, strict=False):
        own = [run for run in runs if run["policy"] == policy]
        saturated = [run["saturated_images_per_s"] for run in own if run["loop"] == "closed"]
        opened = [run for run in own if run["loop"] == "open"]
        for axes, figures in (
            (panels[0], [run["overall"] for run in opened]),
            (panels[1], [run["by_entry"].get(shortest, {}) for run in opened]),
        ):
            for name, style, marker in (("p95", "-", "o"), ("p50", ":", "v")):
                points = [
                    (run["offered_images_per_s"], entry["latency_s"][name])
                    for run, entry in zip(opened, figures, strict=True)
                    if entry.get("latency_s")
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        marker=marker,
                        color=color,
                        label=f"{policy}, {name}",
                    )
            for rate in saturated:
                axes.axvline(rate, color=color, alpha=0.4, linestyle="--", linewidth=1)
    for axes, title in ((panels[0], "all requests"), (panels[1], f"the {shortest} requests of the mix")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("offered load, images/s (dashed: saturated)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        finish(axes)
    panels[0].set_ylabel("latency, s")
    return save(figure, content["environment"], path)


def pyplot() -> Any:
    """matplotlib.pyplot, which writes files alone."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display is looked for
    from matplotlib import pyplot

    return pyplot


def finish(axes: Any) -> None:
    """Grid, and a legend where lines have names."""
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def save(figure: Any, environment: Mapping[str, Any], path: Path) -> Path:
    """Write the figure to `path` (PNG), headed by what the run was on."""
    device = environment.get("gpu") or f"{environment['cpus']} cores, {environment['cpu']}"
    figure.suptitle(device, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
    return path
