"""If this fails, a run trains another network than its recipe says, or exports one that cannot be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.network.dit import DiT
from model.network.kinds import network_macs
from model.network.lamamba import LaMambaDiff
from model.pipeline import LaMambaPipeline
from model.recipes import load_recipe
from model.training.config import TrainConfig
from model.training.network import build_network
from model.training.run import train

DIT = {"kind": "dit", "hidden_size": 16, "num_layers": 1, "num_heads": 2}


def _config(**fields: Any) -> TrainConfig:
    return TrainConfig.from_dict(load_recipe("smoke") | fields)


@pytest.mark.parametrize(
    "network", [{"kind": "lamamba"} | load_recipe("smoke")["network"], DIT], ids=["ours", "dit"]
)
def test_build_network_is_a_function_of_the_seed(network: dict[str, Any]) -> None:
    config = _config(network=network, seed=7)
    architecture = config.network_config(num_classes=5, downsampling=8, in_channels=4)
    built, again = (build_network(config, architecture, torch.device("cpu")) for _ in range(2))
    assert (built.null_label, built.label_dropout) == (5, 0.1)
    assert built.macs() == network_macs(architecture)
    assert isinstance(built.module, DiT if network is DIT else LaMambaDiff)
    weights = dict(built.module.named_parameters())
    others = dict(again.module.named_parameters())
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    copied = built.with_weights(weights)
    assert not copied.training
    assert all(torch.equal(value, weights[name]) for name, value in copied.named_parameters())


@pytest.mark.parametrize(
    ("network", "num_classes"),
    [(DIT, 21), (load_recipe("smoke")["network"] | {"num_classes": 0}, 0)],
    ids=["dit", "unconditional"],
)
def test_smoke_trains_and_exports_other_networks(
    network: dict[str, Any], num_classes: int, tmp_path: Path
) -> None:
    run = {"output_dir": str(tmp_path), "num_views": 8, "num_images": 8, "batch_size": 4, "sample_every": 0}
    options = {"min_snr_gamma": 5.0, "timestep_density": "logit_normal"}
    folder = train(_config(network=network, **run, **options), device="cpu")
    assert folder is not None
    pipeline = LaMambaPipeline.load(folder, device="cpu")
    assert (len(pipeline.labels), pipeline.num_classes, pipeline.resolution) == (num_classes, num_classes, 64)
    assert isinstance(pipeline.network, DiT if network is DIT else LaMambaDiff)
    assert pipeline.generate([0], seeds=[0], num_inference_steps=1).shape == (1, 64, 64, 3)
    card = (folder / "README.md").read_text()
    assert ("An unconditional latent diffusion model" in card) == (num_classes == 0)
    assert ("class" in card.split("```")[0]) == (num_classes > 0)
