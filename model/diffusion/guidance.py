"""Classifier-free guidance (arXiv 2207.12598): eps = eps_uncond + s * (eps_cond - eps_uncond).

The authors guide all latent channels; DiT's code guides the first three and leaves the rest conditional. A
scale of 1 is no guidance: such rows need no unconditional evaluation, and step.py spends none on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["guided_eps"]


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
