"""If this fails, a run minimises something else than its configuration says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.diffusion import diffusion_loss, timestep_quantiles
from model.training.config import TrainConfig
from model.training.objective import Objective

UNIFORM = (torch.arange(512, dtype=torch.float64) + 0.5) / 512
LOGIT_NORMAL: dict[str, Any] = {"timestep_density": "logit_normal", "logit_normal": (-0.5, 1.2)}


def _objective(**fields: Any) -> Objective:
    return Objective(TrainConfig(name="x", output_dir="x", resolution=16, **fields), torch.device("cpu"))


def test_the_papers_timesteps_are_uniform_and_their_losses_unweighted() -> None:
    objective = _objective()
    t = objective.timesteps(UNIFORM)
    assert torch.equal(t, (UNIFORM * 1000).long())
    _assert_losses(objective, t)


def test_options_choose_the_density_and_the_weights() -> None:
    objective = _objective(**LOGIT_NORMAL, min_snr_gamma=5.0)
    t = objective.timesteps(UNIFORM)
    assert torch.equal(t, timestep_quantiles(UNIFORM, 1000, "logit_normal", mean=-0.5, std=1.2))
    _assert_losses(objective, t, min_snr_gamma=5.0)


def _assert_losses(objective: Objective, t: torch.Tensor, **options: float) -> None:
    x0, noise, error = torch.randn(3, len(t), 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x_t = objective.noised(x0, noise, t)
    output = torch.cat([noise + 0.1 * error, error], dim=1)
    expected = diffusion_loss(output, x0, x_t, noise, t, objective.tables, **options)
    losses = objective.losses(output, x0, x_t, noise, t)
    for name, value in losses._asdict().items():
        assert float(value) == pytest.approx(float(getattr(expected, name).mean()), rel=1e-6)
