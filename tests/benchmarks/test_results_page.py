"""docs/results.md: if this fails, a figure is not the paper's, not ours, or taken for the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results_page import card_table, results_page, tables_2_to_4
from model.architecture import architecture_fields
from model.benchmark.environment import RESULTS
from model.config import LaMambaConfig
from model.dit_config import DiTConfig
from model.network.kinds import describe_network
from model.network.macs import PUBLISHED

_PAGE = Path(__file__).parents[2] / "docs" / "results.md"


@pytest.fixture(scope="module")
def sizes() -> dict[str, dict[str, Any]]:
    rows = json.loads((RESULTS / "sizes.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in rows}


def test_the_page_is_that_of_the_figures() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    assert page == results_page(), "run `make docs`"
    assert "| published | LaMamba-Diff-XL-G | 656 | 50 | 2.0 | 2.04 | 4.52 | 296.07 | 0.84 | 0.56 |" in page
    assert "| measured | LaMamba-Diff-XL, ours | 653.47 | 182.93 | - | not measured |" in page
    assert "| real views against other real views: the floor | 2.5 | 2.5 |" in page


def test_every_row_of_table_1_is_there_and_has_all_cells() -> None:
    lines = [
        line for line in _PAGE.read_text(encoding="utf-8").splitlines() if line[:5] in ("| pub", "| mea")
    ]
    assert len(lines) == 25 + 4
    assert {line.count("|") for line in lines} == {11}


def test_the_sizes_are_those_of_the_networks_as_they_are(sizes: dict[str, dict[str, Any]]) -> None:
    """Two of them counted again; the commands' own tests look at all."""
    published = {row.name: row.config() for row in PUBLISHED}
    dits = {f"DiT-{name}/2": DiTConfig.preset(f"{name}/2") for name in ("S", "B", "L", "XL")}
    configs: dict[str, LaMambaConfig | DiTConfig] = {**published, **dits}
    expected = {name: json.loads(json.dumps(architecture_fields(config))) for name, config in configs.items()}
    assert {name: row["config"] for name, row in sizes.items()} == expected, "lamamba info --paper --json"
    for name in ("down-sampling 3x", "DiT-S/2"):
        size = describe_network(configs[name])
        assert (sizes[name]["parameters"], sizes[name]["gmacs"]) == (size["parameters"], size["gmacs"])


def test_a_network_has_the_mean_of_its_seeds_on_most_images(sizes: dict[str, dict[str, Any]]) -> None:
    def row(seed: int, distance: float, images: int) -> dict[str, Any]:
        facts = {"recipe": "imagenet-256-s", "seed": seed, "frechet_distance": distance, "images": images}
        return facts | {"config": {"seed": seed, "num_images": images}}

    study = [row(0, 50.0, 1000), row(0, 20.0, 2000), row(1, 23.0, 2000)]
    lines = {line.split("|")[2].strip(): line for line in tables_2_to_4(list(sizes.values()), study)}
    assert len(lines) == 2 + 21
    assert lines["`imagenet-256-s`"] == (
        "| 2 | `imagenet-256-s` | 32 | 34.11 | 3.19 | 3.20 | 55.68 | 21.50 (2 seeds) |"
    )
    assert lines["`imagenet-256-s-no-attention`"] == (
        "| 3 | `imagenet-256-s-no-attention` | - | 26.24 | 2.45 | 2.47 | 69.78 | not measured yet |"
    )


def test_the_cards_table_is_that_of_its_section() -> None:
    card = "# A\n\n| no |\n\n## Measured\n\ntext\n\n| a |\n|---|\n| 1 |\n\ntext\n\n## Limits\n\n| no |\n"
    assert card_table(card) == "| a |\n|---|\n| 1 |"
