"""If this fails, another number of processes, or a resumed run, trains on other random numbers."""

from __future__ import annotations

import torch

from model.diffusion.noise import gaussian_noise
from model.training.draws import SampleDraws

SHAPE = (2, 3, 5)


def test_draws_are_the_samples_own() -> None:
    """Whatever the batch, and its order, are."""
    whole = SampleDraws.of(torch.arange(100), 3, SHAPE)
    some = torch.tensor([40, 7, 99])
    for name, drawn in vars(SampleDraws.of(some, 3, SHAPE)).items():
        assert torch.equal(drawn, vars(whole)[name][some]), name


def test_draws_are_uniform_and_independent() -> None:
    draws = SampleDraws.of(torch.arange(20_000), 0, SHAPE)
    for uniform in (draws.timestep, draws.dropout):
        assert 0 < float(uniform.min()) < 1e-3
        assert 1 - 1e-3 < float(uniform.max()) < 1
        counts = torch.histc(uniform.float(), bins=10, min=0, max=1)
        assert float((counts - 2000).abs().max()) < 5 * 2000**0.5
    columns = torch.stack(
        [draws.timestep, draws.dropout, draws.posterior[:, 0, 0, 0], draws.noise[:, 0, 0, 0]]
    )
    correlations = torch.corrcoef(columns) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / 20_000**0.5


def test_draws_differ_by_seed() -> None:
    first, second = (SampleDraws.of(torch.arange(4), seed, SHAPE) for seed in (0, 1))
    assert not torch.equal(first.noise, second.noise)
    ones = torch.ones(4, dtype=torch.int64)
    assert torch.equal(second.noise, gaussian_noise(ones, torch.arange(4), ones, SHAPE))
