"""The network that a run's configuration asks for."""

from __future__ import annotations

import dataclasses
import logging

import torch

from model.autoencoder import Autoencoder
from model.model_folder import load_network
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend
from model.training.config import TrainConfig

__all__ = ["build_network"]

logger = logging.getLogger(__name__)


def build_network(
    config: TrainConfig, *, num_classes: int, autoencoder: Autoencoder, device: torch.device
) -> LaMambaDiff:
    """In train mode on `device`, with its initial weights: a function of the seed, or `initial_weights`."""
    architecture = config.network_config(
        num_classes=num_classes,
        downsampling=autoencoder.downsampling,
        in_channels=autoencoder.latent_channels,
    )
    torch.manual_seed(config.seed)
    if config.initial_weights is None:
        network = LaMambaDiff(**dataclasses.asdict(architecture))
    else:
        network = load_network(config.initial_weights)
        if network.architecture != architecture:
            raise ValueError(
                f"initial_weights: {config.initial_weights} holds {network.architecture}; "
                f"{architecture} is accepted"
            )
    network.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides `self` from the checker
    network.use_scan_backend(resolve_scan_backend(config.scan_backend, device))
    logger.info(
        "%s: %.2f M parameters, scan %s, %s",
        config.name,
        sum(p.numel() for p in network.parameters()) / 1e6,
        network.scan_backend,
        device,
    )
    return network.train()
