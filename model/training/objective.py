"""What a training step minimises: which timesteps, and how their losses are weighted.

Uniform timesteps and weight 1, as the paper has it, unless the configuration asks for others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.diffusion.loss import LossTables, diffusion_loss, q_sample
from model.diffusion.schedule import NoiseSchedule
from model.diffusion.timesteps import timestep_quantiles
from model.training.config import TrainConfig

__all__ = ["Losses", "Objective"]


class Losses(NamedTuple):
    """Means over the samples of a batch, fp32 scalars; `loss` is the one to minimise."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


class Objective:
    """The choice of timesteps, and the loss at them, on one device."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config = config
        self.tables = LossTables.from_schedule(NoiseSchedule.linear(), device)

    def timesteps(self, uniform: Tensor) -> Tensor:
        """(n,) int64 timesteps from (n,) float64 numbers, uniform in (0, 1)."""
        mean, std = self._config.logit_normal
        return timestep_quantiles(
            uniform, len(self.tables.sqrt_abar), self._config.timestep_density, mean=mean, std=std
        )

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (n, C, h, w)."""
        return q_sample(x0, noise, t, self.tables)

    def losses(self, output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Losses:
        """Of the network's output at x_t, (n, 2C, h, w) or (n, C, h, w)."""
        gamma = self._config.min_snr_gamma
        losses = diffusion_loss(output.float(), x0, x_t, noise, t, self.tables, min_snr_gamma=gamma)
        return Losses(losses.loss.mean(), losses.mse.mean(), losses.vb.mean())
