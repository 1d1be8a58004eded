"""A network of any kind from its architecture, and its size."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from model.architecture import Architecture
from model.config import LaMambaConfig
from model.dit_config import DiTConfig
from model.network.dit import DiT, dit_macs
from model.network.lamamba import LaMambaDiff
from model.network.macs import count_macs, describe, paper_table, size_beside_paper

__all__ = [
    "NETWORK_CLASSES",
    "DiffusionNetwork",
    "describe_network",
    "network_macs",
    "network_parameters",
    "new_network",
    "published_sizes",
]

DiffusionNetwork = LaMambaDiff | DiT

NETWORK_CLASSES: dict[type[LaMambaConfig] | type[DiTConfig], type[LaMambaDiff] | type[DiT]] = {
    LaMambaConfig: LaMambaDiff,
    DiTConfig: DiT,
}
"""By the kind of architecture."""

_PUBLISHED_DITS = {"S/2": (33, 6.06), "B/2": (130, 23.01), "L/2": (458, 80.71), "XL/2": (675, 118.64)}
"""Parameters in 1e6 and multiply-adds in 1e9 at 256 px that Table 2 prints."""


def new_network(architecture: Architecture) -> DiffusionNetwork:
    """With initial weights from torch's default generator."""
    return NETWORK_CLASSES[type(architecture)](**dataclasses.asdict(architecture))


def network_parameters(architecture: Architecture) -> int:
    """Parameters of the network that `new_network` builds."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in new_network(architecture).parameters())


def network_macs(architecture: Architecture) -> int:
    """Multiply-adds of one forward of one image of `sample_size` latents a side."""
    if isinstance(architecture, DiTConfig):
        return dit_macs(architecture)["total"]
    return count_macs(architecture).total


def describe_network(architecture: Architecture) -> dict[str, Any]:
    """`network.macs.describe`, for a network of any kind."""
    if isinstance(architecture, LaMambaConfig):
        return describe(architecture)
    macs = dit_macs(architecture)
    published = next(
        (size for name, size in _PUBLISHED_DITS.items() if DiTConfig.preset(name) == architecture), None
    )
    return {
        "parameters": network_parameters(architecture),
        "gmacs": macs["total"] / 1e9,
        "breakdown": {
            "linear": (macs["total"] - macs["attention"]) / 1e9,
            "attention": macs["attention"] / 1e9,
        },
        "paper": published
        and {
            "source": "Table 2",
            "parameters_millions": published[0],
            "gmacs": published[1],
            "reason": "met",
        },
    }


def published_sizes() -> list[dict[str, Any]]:
    """`network.macs.paper_table`, with the DiTs of Table 2."""
    rows = paper_table()
    for name in _PUBLISHED_DITS:
        config = DiTConfig.preset(name)
        size = describe_network(config)
        rows.append(size_beside_paper(f"DiT-{name}", config, size, size["paper"]))
    return rows
