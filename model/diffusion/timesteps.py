"""Which timesteps training sees: uniform ones, as in the paper, or more of the middle of the process.

A density is given by its quantiles, so that one uniform number makes a timestep and whoever draws it owns its
seed. Logit-normal (arXiv 2403.03206, section 3.1): t / T = sigmoid(mean + std * z), z standard normal.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TIMESTEP_DENSITIES", "timestep_quantiles"]

TIMESTEP_DENSITIES = ("uniform", "logit_normal")


def timestep_quantiles(
    uniform: Tensor, num_timesteps: int, density: str = "uniform", *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Timesteps (n,) int64, 0 to `num_timesteps` - 1, at the quantiles `uniform` (n,), 0 to below 1.

    Args:
        density: one of `TIMESTEP_DENSITIES`.
        mean, std: of logit-normal alone; a mean below 0 prefers clean latents, std is above 0.
    """
    if density not in TIMESTEP_DENSITIES:
        raise ValueError(f"density: {density!r} given; one of {', '.join(TIMESTEP_DENSITIES)} is accepted")
    if density == "logit_normal":
        uniform = torch.sigmoid(mean + std * torch.special.ndtri(uniform))
    return (uniform * num_timesteps).long().clamp(0, num_timesteps - 1)
