"""The study's table and bubble plot, from `benchmarks/results/study.json` alone.

python benchmarks/study_report.py
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import RESULTS
from model.benchmark.plot import can_plot
from model.recipes import recipe_summaries
from model.whole_file import whole_file

RECIPES = (
    *("imagenet-256-s", "imagenet-256-dit-s-2", "imagenet-256-s-no-attention", "imagenet-256-s-no-shift"),
    *("imagenet-256-s-global-attention", "imagenet-256-s-ss2d", "imagenet-256-s-vim"),
    *("imagenet-256-s-local-mamba", "imagenet-256-s-es2d", "imagenet-256-s-downsample-1x"),
    *("imagenet-256-s-downsample-3x", "imagenet-256-s-decoder-minus-1", "imagenet-256-s-concat"),
    *("imagenet-256-b", "imagenet-256-dit-b-2"),
)
"""What is compared, in the order in which it is run."""
FLOOR = "reserved-views"
"""The recipe of the row that sets views of places against others: what no model gets below."""

_COLORS = {"lamamba": "#c2410c", "ablation": "#78716c", "dit": "#1d4ed8"}
_ABLATION = re.compile(r"imagenet-256-s-")


def main() -> None:
    print(draw(RESULTS / "study.json", RECIPES))


def draw(results: Path, recipes: Sequence[str] = ()) -> str:
    """Write the table beside `results`, as .md, and with matplotlib, of several networks, the plot as .png;
    the table.

    `recipes` come first and are named also where they have no row yet; others of the file follow.
    """
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
    text = table(rows, recipes)
    results.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(results.with_suffix(".md")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    if len({row["recipe"] for row in rows} - {FLOOR}) > 1 and can_plot():
        plot(rows, results.with_suffix(".png"))
    return text


def table(rows: Sequence[dict[str, Any]], recipes: Sequence[str] = ()) -> str:
    """Markdown: a line for each recipe and size of a run, its seeds side by side, the paper's FID behind.

    A seed that others have and a recipe lacks is named, as its mean is not of the same seeds.
    """
    lines = [
        "| recipe | images | parameters, M | GMACs | distance of each seed | mean | images/s | training, min "
        "| the paper's FID |",
        "| - | - | - | - | - | - | - | - | - |",
    ]
    all_groups = groups(rows)
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    order = [*recipes, *(recipe for recipe, _ in all_groups if recipe not in recipes)]
    for recipe in dict.fromkeys(order):
        found = [group for key, group in all_groups.items() if key[0] == recipe]
        if not found:
            lines.append(f"| {recipe} | not run yet |" + " |" * 6 + f" {paper_fid(recipe)} |")
        for group in found:
            distances = ", ".join(
                f"{row['frechet_distance']:.2f} ± {row['standard_error']:.2f}" for row in group
            )
            mean = statistics.mean(row["frechet_distance"] for row in group)
            if recipe == FLOOR:
                lines.append(f"| other {FLOOR.replace('-', ' ')} | | | | {distances} | {mean:.2f} | | | |")
                continue
            present = [row["seed"] for row in group]
            distances += "".join(f"; seed {seed} not run yet" for seed in seeds if seed not in present)
            first = group[0]
            speed = statistics.median(row["images_per_second"] for row in group)
            minutes = statistics.mean(row["training_seconds"] for row in group) / 60
            lines.append(
                f"| {label(first)} | {first['images']:,} "
                f"| {first['parameters'] / 1e6:.2f} | {first['gmacs']:.2f} "
                f"| {distances} | {mean:.2f} | {speed:,.0f} | {minutes:.1f} | {paper_fid(recipe)} |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Distance against multiply-adds, areas are parameters; beside it the paper's FIDs of the networks."""
    import matplotlib as mpl

    mpl.use("Agg")  # writes files; no display is looked for
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for (recipe, _), group in groups(rows).items():
        values = [row["frechet_distance"] for row in group]
        if recipe == FLOOR:
            axes[0].axhline(values[0], color="black", linestyle=":", linewidth=1)
            continue
        # Of the samples, or what the seeds differ by, whichever is more.
        error = max(*(row["standard_error"] for row in group), (max(values) - min(values)) / 2)
        paper = paper_fid(recipe)
        points = [(axes[0], statistics.mean(values), error)]
        points += [(axes[1], float(paper), 0.0)] if paper else []
        for axis, value, bar in points:
            color, x = _COLORS[_kind(recipe)], group[0]["gmacs"]
            axis.errorbar(x, value, yerr=bar or None, color=color, capsize=3, linewidth=1)
            axis.scatter(x, value, s=6 * group[0]["parameters"] / 1e6, color=color, alpha=0.45)
            axis.annotate(
                label(group[0]).removeprefix("imagenet-256-"),
                (x, value),
                textcoords="offset points",
                xytext=(8, 6),
                fontsize=7,
            )
    axes[0].set_ylabel("Fréchet distance, EfficientNet-Lite2 (dotted: other reserved views)")
    axes[0].set_title("places, 256 px", fontsize=10)
    axes[1].set_ylabel("FID-50K, 400 k steps")
    axes[1].set_title("ImageNet 256, as the paper prints it", fontsize=10)
    for axis in axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.margins(0.2)  # room for the names beside the points
        axis.set_ylim(bottom=0)
        axis.set_xlabel("GMACs a forward (areas: parameters)")
        axis.grid(alpha=0.25)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, Any], list[dict[str, Any]]]:
    """Rows that differ by their seed alone, in the order of the file, seeds ascending."""
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        others = {name: value for name, value in row.get("config", {}).items() if name != "seed"}
        key = json.dumps([others, row.get("samples", {}) | {"weights": None}], sort_keys=True)
        found.setdefault((row["recipe"], key), []).append(row)
    return {key: sorted(group, key=lambda row: row["seed"] or 0) for key, group in found.items()}


def label(row: dict[str, Any]) -> str:
    """The recipe of a row, with what was set otherwise in it and which average was measured."""
    length = row.get("samples", {}).get("sigma_rel")
    return ", ".join([row["recipe"], *row.get("set", []), *([f"sigma_rel {length:g}"] if length else [])])


def paper_fid(recipe: str) -> str:
    """The FID of the paper's Tables 2 to 4, whose home is the recipe's summary; empty where it has none."""
    found = re.search(r"Table [234]: FID (\d+\.\d+)", recipe_summaries().get(recipe, ""))
    return found.group(1) if found else ""


def _kind(recipe: str) -> str:
    if "-dit-" in recipe:
        return "dit"
    return "ablation" if _ABLATION.match(recipe) else "lamamba"


if __name__ == "__main__":
    main()
