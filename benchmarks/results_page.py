"""docs/results.md from the paper's figures and ours: `make docs` writes it, a test keeps the two equal.

The text is results_page.md. Published figures: paper_table_1.csv (Table 1), results/sizes.json (sizes of
Tables 2 to 4, with what `lamamba info --paper --json` counts of ours) and the summaries of recipes (their
FIDs). Measured ones: sizes.json, study.json and the rates of an H100 in results/, and the table of the model
card.
"""

from __future__ import annotations

import csv
import json
import statistics
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.study_report import groups, paper_fid
from model.architecture import architecture_fields
from model.benchmark.environment import RESULTS
from model.recipes import load_recipe, recipe_names
from model.training.config import TrainConfig

_TEXT = Path(__file__).with_suffix(".md")
_PAPER = Path(__file__).with_name("paper_table_1.csv")
_CARD = Path(__file__).parents[1] / "docs" / "model-card.md"
_OURS = {"256": "XL", "512": "XL at 512"}
"""The row of sizes.json that is ours in Table 1, by resolution."""
_NUM_METRICS = 5
_TRAINING_IMAGES = 2e6 * 256
"""Of the paper's run at 256 px."""
_NUM_SAMPLES = 50_000


def results_page() -> str:
    """The page, in Markdown."""
    with _PAPER.open(encoding="utf-8", newline="") as file:
        published = list(csv.DictReader(file))
    sizes = {row["name"]: row for row in _json("sizes.json")}
    study = _json("study.json")["rows"] if (RESULTS / "study.json").is_file() else []
    parts = {
        f"table_1_{resolution}_{guidance}": table_1(published, resolution, guidance, sizes[ours])
        for resolution, ours in _OURS.items()
        for guidance in ("without", "with")
    }
    parts["tables_2_to_4"] = "\n".join(tables_2_to_4(list(sizes.values()), study))
    parts["shipped"] = card_table(_CARD.read_text(encoding="utf-8"))
    return string.Template(_TEXT.read_text(encoding="utf-8")).substitute(parts | _cost())


def table_1(published: Iterable[dict[str, str]], resolution: str, guidance: str, ours: dict[str, Any]) -> str:
    """Rows of one part of the paper's Table 1, and ours."""
    lines = [
        "| figures | model | parameters, M | GMACs | steps, M | FID | sFID | IS | precision | recall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in published:
        if (row["resolution"], row["guidance"]) == (resolution, guidance):
            cells = [value or "-" for name, value in row.items() if name not in ("resolution", "guidance")]
            lines.append(f"| published | {' | '.join(cells)} |")
    size = f"{ours['parameters'] / 1e6:.2f} | {ours['gmacs']:.2f}"
    lines.append(f"| measured | LaMamba-Diff-XL, ours | {size} | -" + " | not measured" * _NUM_METRICS + " |")
    return "\n".join(lines)


def tables_2_to_4(sizes: Sequence[dict[str, Any]], study: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each network of the paper's Tables 2 to 4 that a recipe trains."""
    yield (
        "| table | recipe | parameters, M: published | measured | GMACs: published | measured "
        "| FID: published | distance on places: measured |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    recipes = {_imagenet_network(recipe): recipe for recipe in recipe_names() if paper_fid(recipe)}
    for row in sorted(sizes, key=lambda row: row["source"]):
        recipe = recipes.get(json.dumps(row["config"], sort_keys=True))
        if recipe is not None:
            cells = (
                *(row["source"].removeprefix("Table "), f"`{recipe}`"),
                *(row["paper_parameters_millions"] or "-", f"{row['parameters'] / 1e6:.2f}"),
                *(f"{row['paper_gmacs']:.2f}", f"{row['gmacs']:.2f}"),
                *(paper_fid(recipe), _distance(recipe, study)),
            )
            yield f"| {' | '.join(map(str, cells))} |"


def card_table(card: str) -> str:
    """The table of the model card's section Measured."""
    section = card.split("\n## Measured\n")[1].split("\n## ")[0]
    return "\n".join(line for line in section.splitlines() if line.startswith("|"))


def _json(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _imagenet_network(recipe: str) -> str:
    """The network that the recipe trains on ImageNet's latents, as JSON."""
    config = TrainConfig.from_dict(load_recipe(recipe))
    network = config.network_config(num_classes=1000, downsampling=8, in_channels=4)
    return json.dumps(architecture_fields(network), sort_keys=True)


def _distance(recipe: str, study: Sequence[dict[str, Any]]) -> str:
    """The mean over seeds and how many, of the runs on most images where there are several."""
    as_published = [row for row in study if not row.get("set") and "sigma_rel" not in row.get("samples", {})]
    runs = [group for (name, _), group in groups(as_published).items() if name == recipe]
    if not runs:
        return "not measured yet"
    most = max(runs, key=lambda group: group[0]["images"])
    seeds = "one seed" if len(most) == 1 else f"{len(most)} seeds"
    return f"{statistics.mean(row['frechet_distance'] for row in most):.2f} ({seeds})"


def _cost() -> dict[str, str]:
    """What Table 1's XL at 256 px takes at the rates measured on one GPU."""
    training, sampling = (
        _json("training-h200.json")["results"]["rows"],
        _json("images-h100.json")["results"],
    )
    trained = max(row["images_per_second"] for row in training if row["name"] == "XL")
    sampled = max(
        row["images_per_s"] for row in sampling if row["provider"] == "lamamba" and row["resolution"] == 256
    )
    return {
        "trained": f"{trained:.0f}",
        "sampled": f"{sampled:.2f}",
        "days": f"{_TRAINING_IMAGES / trained / 86400:.1f}",
        "hours": f"{_NUM_SAMPLES / sampled / 3600:.1f}",
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(results_page(), encoding="utf-8")
