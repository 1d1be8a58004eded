"""The network that a run's configuration asks for, with what the training loop has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.architecture import Architecture
from model.model_folder import load_network
from model.network.kinds import DiffusionNetwork, network_macs, new_network
from model.network.scan import resolve_scan_backend
from model.training.config import TrainConfig

__all__ = ["TrainedNetwork", "build_network"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedNetwork:
    """A network to be trained: `module(latents, timestep=t, class_labels=labels).sample`."""

    module: Any
    """In train mode, fp32, on the device."""
    null_label: int
    label_dropout: float
    """Probability that a sample's label becomes the null label."""
    macs: Callable[[], int]
    """Counts the multiply-adds of one image's forward, which takes a second; a training step takes six
    operations for each.
    """
    build: Callable[[], nn.Module]
    """Another of the kind, with weights of its own, on the device and in eval mode."""

    def with_weights(self, weights: Mapping[str, Tensor]) -> Any:
        """Such a network whose parameters have these values, for sampling and for export."""
        module = self.build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        return module.requires_grad_(False)


def build_network(config: TrainConfig, architecture: Architecture, device: torch.device) -> TrainedNetwork:
    """With its initial weights: a function of the seed, or those of `initial_weights`.

    ValueError where the latter do not fit.
    """
    backend = resolve_scan_backend(config.scan_backend, device)

    def placed(network: DiffusionNetwork) -> DiffusionNetwork:
        nn.Module.to(network, device)  # torch's own: diffusers' warns at every cast
        network.use_scan_backend(backend)
        return network

    def build() -> DiffusionNetwork:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            return placed(new_network(architecture)).eval()

    if config.initial_weights is None:
        torch.manual_seed(config.seed)
        network = new_network(architecture)
    else:
        network = load_network(config.initial_weights)
        if network.architecture != architecture:
            raise ValueError(
                f"initial_weights: {config.initial_weights} holds {network.architecture}; "
                f"{architecture} is accepted"
            )
    if config.activation_checkpointing:
        # Blocks draw no random numbers, so there is no generator's state to put back.
        network.enable_gradient_checkpointing(
            lambda module, *inputs: torch.utils.checkpoint.checkpoint(
                module, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        )
    return TrainedNetwork(
        module=placed(network).train(),
        null_label=architecture.num_classes,
        label_dropout=architecture.class_dropout_prob if architecture.num_classes else 0.0,
        macs=lambda: network_macs(architecture),
        build=build,
    )
