"""Samplers as tables: DDPM, DDIM and DPM-Solver++(2M) are one linear update with different coefficients.

    x0     = x0_latents * x + x0_eps * eps
    x_next = latents * x + eps_c * eps + history_c * history + noise_c * exp(logvar / 2) * noise
    logvar = min_log_variance + (v + 1) / 2 * (max_log_variance - min_log_variance)

where (eps, v) is the network's output and `history` the x0 of the row's step before. A table has one row of
coefficients a step, made from the noise schedule in float64 and rounded once. Rows of a batch do not see
each other, so a batch may mix samplers, step counts and positions. Tables are cached: treat their tensors
as read-only.

- ddpm: ancestral sampling with learned range (arXiv 2102.09672, equation 15), x0 not clipped.
- ddim: arXiv 2010.02502, equation 12; sigma = eta * its equation 16; v is not used.
- dpm++: DPM-Solver++(2M), arXiv 2211.01095, algorithm 2 (midpoint), first order at both ends and ending at
  sigma 0: the arithmetic of diffusers' DPMSolverMultistepScheduler; v is not used.

Letters: T training steps; a, ap are abar here and one kept step nearer to the clean end (1 at the last).
Left elsewhere: where eps comes from (step.py, guidance.py), where the noise comes from (noise.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from model.diffusion.schedule import Float64Array, NoiseSchedule, respaced_timesteps

__all__ = [
    "SAMPLERS",
    "TIMESTEP_SPACINGS",
    "Coefficient",
    "SamplerTable",
    "diffusers_scheduler_config",
    "sampler_step",
    "sampler_table",
]

SAMPLERS = ("ddpm", "ddim", "dpm++")
TIMESTEP_SPACINGS = ("linspace", "trailing", "leading")


class Coefficient(IntEnum):
    """The columns of a table."""

    LATENTS = 0
    EPS = 1
    HISTORY = 2
    X0_LATENTS = 3
    X0_EPS = 4
    MIN_LOG_VARIANCE = 5
    MAX_LOG_VARIANCE = 6
    NOISE = 7


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerTable:
    """What a sampler does at each of its n steps, in sampling order (noisy to clean)."""

    name: str
    timesteps: Tensor
    """(n,) int64: the step number of the full process that the network is shown."""
    coefficients: Tensor
    """(n, 8) fp32, columns as in `Coefficient`; finite."""
    stochastic: bool
    """Whether any step reads noise."""


def sampler_table(
    sampler: str,
    num_inference_steps: int,
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    timestep_spacing: str | None = None,
) -> SamplerTable:
    """The table of a sampler over `num_inference_steps` of the schedule's steps.

    Args:
        sampler: one of `SAMPLERS`.
        num_inference_steps: 1 to the schedule's number of steps.
        eta: ddim alone, 0 (deterministic) to 1 (as much noise as ddpm with its smallest variance).
        timestep_spacing: which steps, one of `TIMESTEP_SPACINGS`. "linspace" spreads them evenly: from 0 to
            T - 1 both included for ddpm (its default, the authors') and ddim, from n + 1 such points
            without the cleanest for dpm++ (its default). "trailing" (ddim's default) counts down from T - 1
            in strides of T / n. "leading" counts up from 0 by an integer stride (the authors' "ddimN"; for
            dpm++ from one stride), which not every number of steps allows.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} given; accepted are {', '.join(SAMPLERS)}")
    if not 1 <= num_inference_steps <= schedule.num_timesteps:
        raise ValueError(
            f"num_inference_steps: {num_inference_steps} given; "
            f"this process accepts 1 to {schedule.num_timesteps}"
        )
    if sampler == "ddim" and not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: {eta} given; ddim accepts 0 to 1")
    if sampler != "ddim" and eta != 0.0:
        raise ValueError(f"eta: {eta} given; {sampler} accepts 0 alone")
    if timestep_spacing is None:
        timestep_spacing = "trailing" if sampler == "ddim" else "linspace"
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(
            f"timestep_spacing: {timestep_spacing!r} given; accepted are {', '.join(TIMESTEP_SPACINGS)}"
        )
    return _sampler_table(sampler, num_inference_steps, schedule, float(eta), timestep_spacing)


def sampler_step(
    latents: Tensor,
    eps: Tensor,
    variance_logits: Tensor | None,
    history: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of every row by its own coefficients; returns the next latents and the next history.

    A row whose coefficient for history or noise is 0 does not read that input: what a reused buffer holds
    there, NaN included, cannot reach it.

    Args:
        latents, eps, history: (rows, C, H, W) fp32; at an image's first step history is not read.
        variance_logits: (rows, C, H, W) fp32, v; None takes the upper end of the range, as for a network
            that does not learn its variance.
        noise: (rows, C, H, W) fp32 standard normal; None is for batches in which no row is stochastic.
        coefficients: (rows, 8) fp32, rows of `SamplerTable.coefficients`.
    """
    columns = coefficients[:, :, None, None, None].unbind(1)  # 8 x (rows, 1, 1, 1)
    latents_c, eps_c, history_c, x0_latents, x0_eps, low, high, noise_c = columns  # as in `Coefficient`
    x0 = x0_latents * latents + x0_eps * eps
    x = latents_c * latents + eps_c * eps + _where_used(history_c, history)
    if noise is not None:
        log_variance = high if variance_logits is None else low + (variance_logits + 1) / 2 * (high - low)
        x = x + _where_used(noise_c, torch.exp(0.5 * log_variance) * noise)
    return x, x0


def diffusers_scheduler_config(schedule: NoiseSchedule) -> dict[str, int | float | str | bool]:
    """`scheduler_config.json` of the diffusers scheduler that samples this process as "dpm++" does here.

    It has no `variance_type`: with "learned_range" diffusers would split the output of our network a second
    time.
    """
    start, end = schedule.beta_values[0], schedule.beta_values[-1]
    if schedule != NoiseSchedule.linear(schedule.num_timesteps, start, end):
        raise ValueError(
            f"schedule: betas {start} to {end} given; a full process of linear betas is accepted"
        )
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "timestep_spacing": "linspace",
    }


def _where_used(coefficient: Tensor, value: Tensor) -> Tensor:
    return torch.where(coefficient == 0, 0.0, coefficient * value)


@lru_cache(maxsize=256)
def _sampler_table(
    sampler: str, num_inference_steps: int, schedule: NoiseSchedule, eta: float, timestep_spacing: str
) -> SamplerTable:
    kept = _kept_timesteps(sampler, num_inference_steps, schedule.num_timesteps, timestep_spacing)
    respaced = schedule.respaced(kept)
    if sampler == "ddpm":
        columns = _ddpm_columns(respaced)
    elif sampler == "ddim":
        columns = _ddim_columns(respaced, eta)
    else:
        columns = _dpm_solver_columns(respaced)
    a = respaced.alphas_cumprod
    columns[Coefficient.X0_LATENTS] = 1.0 / np.sqrt(a)
    columns[Coefficient.X0_EPS] = -np.sqrt(1.0 / a - 1.0)
    table = np.zeros((num_inference_steps, len(Coefficient)))
    for column, values in columns.items():
        table[:, column] = values[::-1]
    return SamplerTable(
        name=sampler,
        timesteps=torch.tensor(respaced.timesteps[::-1], dtype=torch.int64),
        coefficients=torch.from_numpy(table).to(torch.float32),
        stochastic=bool(table[:, Coefficient.NOISE].any()),
    )


def _kept_timesteps(sampler: str, n: int, num_timesteps: int, spacing: str) -> tuple[int, ...]:
    """The n steps kept, ascending: indices into the schedule."""
    if spacing == "trailing":
        # numpy's arange, cut to n: halves are rounded as diffusers rounds them, and a rounding of T / n
        # adds no step.
        points = np.arange(num_timesteps, 0, -num_timesteps / n)[:n].round() - 1
        return tuple(int(point) for point in points[::-1])
    if spacing == "leading" and sampler == "dpm++":
        stride = num_timesteps // (n + 1)
        if stride == 0:
            raise ValueError(
                f"num_inference_steps: {n} given; "
                f"dpm++ with leading timesteps accepts 1 to {num_timesteps - 1}"
            )
        return tuple(range(stride, n * stride + 1, stride))
    if spacing == "leading":
        return respaced_timesteps(f"ddim{n}", num_timesteps)
    if sampler == "dpm++" and n < num_timesteps:
        points = np.linspace(0, num_timesteps - 1, n + 1).round()[1:]
        return tuple(int(point) for point in points)
    if n == 1:
        # The authors' "1" keeps step 0, which would show the network pure noise as a nearly clean image.
        return (num_timesteps - 1,)
    return respaced_timesteps(
        str(n), num_timesteps
    )  # for dpm++: all T steps; T + 1 rounded points repeat one


def _ddpm_columns(schedule: NoiseSchedule) -> dict[Coefficient, Float64Array]:
    a = schedule.alphas_cumprod
    weight = schedule.posterior_mean_coef1
    noise = np.ones_like(a)
    noise[0] = 0.0
    return {
        Coefficient.LATENTS: weight / np.sqrt(a) + schedule.posterior_mean_coef2,
        Coefficient.EPS: -weight * np.sqrt(1.0 / a - 1.0),
        Coefficient.MIN_LOG_VARIANCE: schedule.posterior_log_variance_clipped,
        Coefficient.MAX_LOG_VARIANCE: schedule.log_betas,
        Coefficient.NOISE: noise,
    }


def _ddim_columns(schedule: NoiseSchedule, eta: float) -> dict[Coefficient, Float64Array]:
    a, ap = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    variance = eta**2 * (1.0 - ap) / (1.0 - a) * (1.0 - a / ap)
    used = variance > 0.0  # never at the last step, where ap = 1
    log_variance = np.log(np.where(used, variance, 1.0))
    return {
        Coefficient.LATENTS: np.sqrt(ap / a),
        Coefficient.EPS: np.sqrt(1.0 - ap - variance) - np.sqrt(ap) * np.sqrt(1.0 / a - 1.0),
        Coefficient.MIN_LOG_VARIANCE: log_variance,
        Coefficient.MAX_LOG_VARIANCE: log_variance,
        Coefficient.NOISE: used.astype(np.float64),
    }


def _dpm_solver_columns(schedule: NoiseSchedule) -> dict[Coefficient, Float64Array]:
    """x_next = sigma_next / sigma * x + k * ((1 + w) * x0 - w * history).

    h is the step in half log SNR, k = alpha_next * (1 - exp(-h)), and w = h / (2 h_before), but 0 for a step
    of first order.
    """
    a, ap = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    shrink = np.sqrt((1.0 - ap) / (1.0 - a))
    k = np.sqrt(ap) - shrink * np.sqrt(a)  # exp(-h) = (sigma_next / alpha_next) / (sigma / alpha)
    h = -np.diff(np.log(a / (1.0 - a)) / 2)  # h[i]: from kept step i + 1 down to i, in half log SNR
    w = np.zeros_like(a)
    w[1:-1] = h[:-1] / h[1:] / 2  # first order at the first step and at the last, where h is infinite
    return {
        Coefficient.LATENTS: shrink + k * (1.0 + w) / np.sqrt(a),
        Coefficient.EPS: -k * (1.0 + w) * np.sqrt(1.0 / a - 1.0),
        Coefficient.HISTORY: -k * w,
    }
