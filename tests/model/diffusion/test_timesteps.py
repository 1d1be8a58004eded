"""If this fails, training sees other timesteps than its configuration says."""

from __future__ import annotations

import pytest
import torch

from model.diffusion import timestep_quantiles

EVENLY = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def test_timestep_quantiles_of_the_uniform_density_have_each_timestep_as_often() -> None:
    counts = timestep_quantiles(EVENLY, 1000).bincount(minlength=1000)
    assert (counts == 200).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.2), (1.0, 0.25)])
def test_timestep_quantiles_of_logit_normal_have_its_distribution(mean: float, std: float) -> None:
    """P(t < k) = Phi((logit(k / T) - mean) / std)."""
    t = timestep_quantiles(EVENLY, 1000, "logit_normal", mean=mean, std=std)
    assert (t.diff() >= 0).all()
    for k in (1, 50, 250, 500, 900, 999):
        expected = torch.special.ndtr((torch.tensor(k / 1000).logit() - mean) / std)
        assert float((t < k).double().mean()) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_timestep_quantiles_stay_in_the_process_at_both_ends(density: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    t = timestep_quantiles(ends, 1000, density, std=8.0)
    assert t.tolist() == [0, 999]
    assert t.dtype == torch.int64


def test_timestep_quantiles_refuse_an_unknown_density() -> None:
    with pytest.raises(ValueError, match="density: 'cosine' given; one of uniform, logit_normal is accepted"):
        timestep_quantiles(EVENLY, 1000, "cosine")
