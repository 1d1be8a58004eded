"""A folder of a real network that runs in milliseconds: 16 px images, 8x8 latents under an f2 autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from model.model_folder import add_guidance_network, save_model_folder
from model.network.dit import DiT
from model.network.lamamba import LaMambaDiff

LABELS = ("red barn", "blue house", "green hill")


def save_tiny_model(root: Path, labels: Sequence[str] = LABELS, **config: Any) -> Path:
    """Write the model, untrained and called "tiny", into a folder of `root`, and return that.

    `config` are further fields of the network's, which is as shallow as one of three stages can be.
    """
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")
    fields = {"sample_size": 8, "hidden_size": 8, "num_heads": 2, "depths": (1, 1, 1, 0)}
    fields |= {"num_classes": len(labels), "decoder_extra_block": False} | config
    network = LaMambaDiff(**fields)
    for parameter in network.parameters():
        # The zero-initialised modulations would hide the label and the timestep from the output.
        torch.nn.init.normal_(parameter, std=0.1)
    save_model_folder(
        root / "model",
        network=network,
        autoencoder=root / "vae",
        labels=labels,
        name="tiny",
        dtype=torch.float32,
    )
    return root / "model"


def save_autoguided_model(root: Path, **config: Any) -> Path:
    """`save_tiny_model` with a guidance network of other weights, a DiT."""
    folder = save_tiny_model(root, **config)
    small = DiT(sample_size=8, hidden_size=16, num_layers=1, num_heads=2, num_classes=len(LABELS))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model_folder(root / "small", network=small, autoencoder=root / "vae", labels=LABELS, name="small")
    add_guidance_network(folder, root / "small")
    return folder
