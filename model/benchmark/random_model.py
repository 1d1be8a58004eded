"""A model folder with random weights: what `lamamba serve` is measured with where no weights are at hand.

Speed and memory of a network do not depend on its weights, so a preset's capacity on a card is known before
anybody has trained it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from model.benchmark.config import architecture
from model.benchmark.networks import build_lamamba
from model.benchmark.sampling import build_vae
from model.model_folder import save_model_folder

__all__ = ["LATENT_PIXELS", "write_random_model"]

LATENT_PIXELS = 8
"""Pixels along a side that a latent stands for."""


def write_random_model(folder: Path, preset: str, resolution: int, device: torch.device) -> Path:
    """Write a preset of ours for images of `resolution` pixels, with the autoencoder of `bench images`.

    Weights are random, modulations included, and a function of the preset; bf16. Raises ValueError for a
    resolution that the preset does not fit, and for a folder that exists.
    """
    if folder.exists():
        raise ValueError(f"folder: {folder} given, which exists; a new one is accepted")
    if resolution % LATENT_PIXELS:
        raise ValueError(f"resolution: {resolution} given; multiples of {LATENT_PIXELS} are accepted")
    side = resolution // LATENT_PIXELS
    num_classes = architecture(preset, side).num_classes
    network = build_lamamba(preset, side, d_state=1, device=device, dtype=torch.bfloat16, trainable=True)
    with tempfile.TemporaryDirectory() as autoencoder:
        build_vae(preset, device).save_pretrained(autoencoder)
        save_model_folder(
            folder,
            network=network.cpu(),
            autoencoder=Path(autoencoder),
            labels=[f"class {index}" for index in range(num_classes)],
            name=folder.name,
        )
    return folder
