"""Classifier-free guidance (arXiv 2207.12598): eps = eps_uncond + s * (eps_cond - eps_uncond).

The authors guide all latent channels; DiT's code guides the first three and leaves the rest conditional. A
scale of 1 is no guidance: such rows need no unconditional evaluation, and step.py spends none on them. Nor
does it outside of an interval of timesteps that an image may be given (arXiv 2404.07724): at the noisiest
steps guidance narrows what is made, at the cleanest ones it changes little.

In autoguidance (arXiv 2406.02507) eps_uncond is that of a smaller network, with the class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_guidance_interval", "guided_eps", "guided_steps"]


def guided_eps(
    eps_cond: Tensor, eps_uncond: Tensor, guidance_scale: Tensor, channels: int | None = None
) -> Tensor:
    """Guided noise prediction, (rows, C, H, W).

    Args:
        eps_cond, eps_uncond: (rows, C, H, W).
        guidance_scale: (rows,), 1 = off.
        channels: how many of the first channels are guided; None is all of them.
    """
    scale = guidance_scale[:, None, None, None]
    guided = eps_uncond[:, :channels] + scale * (eps_cond[:, :channels] - eps_uncond[:, :channels])
    if channels is None:
        return guided
    return torch.cat([guided, eps_cond[:, channels:]], dim=1)


def guided_steps(
    timesteps: Sequence[int], guidance_scale: float, interval: tuple[int, int] | None = None
) -> range:
    """At which of a sampler's steps an image is guided, counted from 0: a range, as timesteps descend.

    Args:
        timesteps: what the network is shown, step by step (`SamplerTable.timesteps`).
        guidance_scale: 1 = off.
        interval: the least and the greatest timestep with guidance; None is all of them.
    """
    if guidance_scale == 1.0:
        return range(0)
    low, high = interval or (0, max(timesteps))
    inside = [step for step, timestep in enumerate(timesteps) if low <= timestep <= high]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def check_guidance_interval(interval: tuple[int, int], num_train_timesteps: int) -> None:
    """Raise ValueError for what is no interval of a process of so many timesteps."""
    low, high = interval
    if not 0 <= low <= high < num_train_timesteps:
        raise ValueError(
            f"guidance_interval: {low} to {high} given; "
            f"timesteps from 0 to {num_train_timesteps - 1}, the lower one first, are accepted"
        )
