"""The random numbers of a training sample, as functions of (seed, sample index) alone.

A run's samples are numbered from 0 on. What sample g is made with does not depend on the batch that it is in,
on the rank that computes it, or on what was computed before: any world size, micro-batch or resumption trains
on the same numbers. They are element-wise functions of a tensor of indices, so a CUDA graph holds them.

Uniform numbers are the normal distribution function of Gaussian ones: one kernel serves all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.diffusion.noise import gaussian_noise

__all__ = ["SampleDraws"]

_POSTERIOR, _NOISE, _SCALARS = 0, 1, 2  # the draws of a sample's generator


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleDraws:
    """The draws of n samples, on the device of their indices."""

    timestep: Tensor
    """(n,) float64 in (0, 1), uniform."""
    dropout: Tensor
    """(n,) float64 in (0, 1), uniform: the label is dropped where it is below the probability."""
    posterior: Tensor
    """(n, C, h, w) fp32, standard normal, for the autoencoder's posterior."""
    noise: Tensor
    """(n, C, h, w) fp32, standard normal, for the diffusion process."""

    @classmethod
    def of(cls, sample_indices: Tensor, seed: int, latent_shape: tuple[int, int, int]) -> SampleDraws:
        """`sample_indices` (n,) int64; `seed` and they are at least 0."""
        seeds = torch.full_like(sample_indices, seed)

        def normal(draw: int, shape: tuple[int, int, int]) -> Tensor:
            return gaussian_noise(seeds, sample_indices, torch.full_like(seeds, draw), shape)

        uniform = torch.special.ndtr(normal(_SCALARS, (2, 1, 1)).flatten(1).double())  # (n, 2)
        return cls(
            timestep=uniform[:, 0],
            dropout=uniform[:, 1],
            posterior=normal(_POSTERIOR, latent_shape),
            noise=normal(_NOISE, latent_shape),
        )
