"""The training loss: squared error of eps, plus the variational bound that teaches the variance.

    loss = mean (eps - noise)^2 + VB,     VB = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0,
                                               -log p(x_0 | x_1), discretised at +-1/255, for t = 0

VB is in bits a dimension, its mean is frozen (eps detached), and it has no weight: L_hybrid of "Improved
DDPM" (arXiv 2102.09672, section 3.1), whose lambda of 0.001 makes a mean over its 1000 terms of their sum.
As ADM's, DiT's and the authors' code have it.

By option the squared error is weighted by min(SNR, gamma) / SNR, SNR = abar / (1 - abar) (min-SNR, arXiv
2303.09556): x_0's error with its weight bounded by gamma. It takes weight off the cleanest timesteps, where
eps is hardest to tell and matters least. VB keeps its own weight.

Letters: t (batch,) indices into the full process; v the variance logits. Everything is fp32 whatever the
network's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from model.diffusion.schedule import Float64Array, NoiseSchedule

__all__ = ["DiffusionLoss", "LossTables", "diffusion_loss", "q_sample"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LossTables:
    """The schedule's tables that the loss picks from, (T,) fp32 each, all on one device."""

    sqrt_abar: Tensor
    sqrt_one_minus_abar: Tensor
    x0_latents: Tensor
    """1 / sqrt(abar): weight of x_t in the predicted x_0."""
    x0_eps: Tensor
    """-sqrt(1 / abar - 1): weight of eps in the predicted x_0."""
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    min_log_variance: Tensor
    max_log_variance: Tensor
    snr: Tensor
    """abar / (1 - abar)."""

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, device: torch.device | str = "cpu") -> LossTables:
        """Round the float64 tables to fp32, once."""

        def rounded(table: Float64Array) -> Tensor:
            return torch.tensor(table, dtype=torch.float32, device=device)

        abar = schedule.alphas_cumprod
        return cls(
            sqrt_abar=rounded(np.sqrt(abar)),
            sqrt_one_minus_abar=rounded(np.sqrt(1.0 - abar)),
            x0_latents=rounded(1.0 / np.sqrt(abar)),
            x0_eps=rounded(-np.sqrt(1.0 / abar - 1.0)),
            posterior_mean_coef1=rounded(schedule.posterior_mean_coef1),
            posterior_mean_coef2=rounded(schedule.posterior_mean_coef2),
            min_log_variance=rounded(schedule.posterior_log_variance_clipped),
            max_log_variance=rounded(schedule.log_betas),
            snr=rounded(abar / (1.0 - abar)),
        )

    def to(self, device: torch.device | str) -> LossTables:
        """The same tables on another device."""
        return LossTables(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionLoss:
    """Losses of each sample, (batch,) fp32: `loss` is the sum of the other two, the mse by its weight."""

    loss: Tensor
    mse: Tensor
    vb: Tensor
    """Bits a dimension; 0 for a network that does not learn its variance."""


def q_sample(x0: Tensor, noise: Tensor, t: Tensor, schedule_tables: LossTables) -> Tensor:
    """x_t of the forward process, (batch, C, H, W) fp32; t is (batch,) int64."""
    signal = _pick(schedule_tables.sqrt_abar, t) * x0
    return signal + _pick(schedule_tables.sqrt_one_minus_abar, t) * noise


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule_tables: LossTables,
    *,
    min_snr_gamma: float = math.inf,
) -> DiffusionLoss:
    """The loss of each sample.

    Args:
        model_output: (batch, 2C, H, W), eps then v; or (batch, C, H, W), eps alone.
        x0, x_t, noise: (batch, C, H, W) fp32, x_t = q_sample(x0, noise, t).
        t: (batch,) int64 in [0, T).
        min_snr_gamma: above 0; inf weights all timesteps alike.
    """
    channels = x0.shape[1]
    model_output = model_output.float()
    eps, variance_logits = model_output[:, :channels], model_output[:, channels:]
    mse = _mean((eps - noise) ** 2)
    weighted = mse
    if min_snr_gamma < math.inf:
        weighted = mse * (min_snr_gamma / schedule_tables.snr[t]).clamp(max=1.0)
    if variance_logits.shape[1] == 0:
        return DiffusionLoss(loss=weighted, mse=mse, vb=torch.zeros_like(mse))
    vb = _variational_bound(eps.detach(), variance_logits, x0, x_t, t, schedule_tables)
    return DiffusionLoss(loss=weighted + vb, mse=mse, vb=vb)


def _variational_bound(
    eps: Tensor, variance_logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, tables: LossTables
) -> Tensor:
    """VB of each sample in bits a dimension, (batch,). Both branches are computed: t stays on the device."""
    low, high = _pick(tables.min_log_variance, t), _pick(tables.max_log_variance, t)
    log_variance = low + (variance_logits + 1) / 2 * (high - low)
    x0_weight = _pick(tables.posterior_mean_coef1, t)
    predicted_x0 = _pick(tables.x0_latents, t) * x_t + _pick(tables.x0_eps, t) * eps
    # The two means share their x_t term, so only x0's enters the difference.
    difference = x0_weight * (x0 - predicted_x0)
    kl = 0.5 * (-1.0 + log_variance - low + torch.exp(low - log_variance))
    kl = kl + 0.5 * difference**2 * torch.exp(-log_variance)
    mean = x0_weight * predicted_x0 + _pick(tables.posterior_mean_coef2, t) * x_t
    nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2.0)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the Gaussian's mass in x +- 1/255, in nats, element-wise; the bins beyond +-0.999 are open."""
    centred, inverse_scale = x - mean, torch.exp(-log_scale)
    below = _approximate_normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    above = _approximate_normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1.0 - below, above - below))
    return torch.log(mass.clamp(min=1e-12))


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _pick(table: Tensor, t: Tensor) -> Tensor:
    return table[t][:, None, None, None]  # (batch, 1, 1, 1)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)  # (batch,)
