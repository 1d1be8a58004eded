"""If this fails, a recipe is not found, or an override silently changes nothing."""

from pathlib import Path

import pytest

from model.recipes import load_recipe, recipe_names
from model.training.config import TrainConfig


@pytest.mark.parametrize("name", recipe_names())
def test_load_recipe_of_every_packaged_recipe_is_a_valid_run(name: str) -> None:
    config = TrainConfig.from_dict(load_recipe(name))
    architecture = config.network_config(num_classes=21, downsampling=8, in_channels=4)
    assert architecture.sample_size * 8 == config.resolution
    assert architecture.num_classes == 21
    assert (Path(config.autoencoder_source) / "config.json").is_file()  # trains on a clean clone


def test_load_recipe_applies_overrides_with_their_types() -> None:
    fields = load_recipe(
        "places-128", ["learning_rate=1e-4", "network.hidden_size=64", "name=mine", "cuda_graph=false"]
    )
    assert fields["learning_rate"] == 1e-4
    assert fields["network"]["hidden_size"] == 64
    assert fields["name"] == "mine"
    assert fields["cuda_graph"] is False


def test_load_recipe_reads_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own\nlearning_rate: 1e-4\nnum_images: 10\n")
    assert load_recipe(str(tmp_path / "own.yaml")) == {"name": "own", "learning_rate": 1e-4, "num_images": 10}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("places-1024", [], "config: 'places-1024' given; a file or one of places-128, places-256"),
        ("places-128", ["learning_rate"], "override: 'learning_rate' given; key=value is accepted"),
        ("places-128", ["name.first=a"], "'name' has no fields of its own"),
    ],
    ids=["unknown", "no-equals", "scalar-parent"],
)
def test_load_recipe_refuses(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(name, overrides)


def test_load_recipe_refuses_broken_yaml(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=r"broken\.yaml cannot be read"):
        load_recipe(str(tmp_path / "broken.yaml"))
