"""If this fails, the guidance scale means something else than in the authors' code or in DiT's."""

from __future__ import annotations

import pytest
import torch

from model.diffusion import NoiseSchedule, check_guidance_interval, guided_eps, guided_steps, sampler_table

COND = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
UNCOND = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(1))


def test_guided_eps_extrapolates_each_row_by_its_own_scale() -> None:
    scale = torch.tensor([1.5, 4.0, 0.0])
    guided = guided_eps(COND, UNCOND, scale)
    for i in range(3):
        torch.testing.assert_close(guided[i], UNCOND[i] + scale[i] * (COND[i] - UNCOND[i]))
    assert torch.equal(guided[2], UNCOND[2])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guided_eps_leaves_further_channels_conditional(channels: int) -> None:
    scale = torch.tensor([4.0, 4.0, 4.0])
    guided = guided_eps(COND, UNCOND, scale, channels)
    assert torch.equal(guided[:, :channels], guided_eps(COND, UNCOND, scale)[:, :channels])
    assert torch.equal(guided[:, channels:], COND[:, channels:])


def test_guided_eps_of_scale_one_is_conditional() -> None:
    torch.testing.assert_close(guided_eps(COND, UNCOND, torch.ones(3)), COND)


@pytest.mark.parametrize(
    ("scale", "interval", "expected"),
    [
        pytest.param(2.0, None, range(5), id="everywhere"),
        pytest.param(1.0, None, range(0), id="scale-one"),
        pytest.param(1.0, (0, 999), range(0), id="scale-one-in-an-interval"),
        pytest.param(2.0, (0, 999), range(5), id="all-timesteps"),
        pytest.param(2.0, (200, 600), range(2, 4), id="both-ends-included"),
        pytest.param(2.0, (201, 599), range(0), id="between-two-steps"),
        pytest.param(2.0, (700, 999), range(2), id="noisy"),
        pytest.param(2.0, (0, 0), range(4, 5), id="clean"),
    ],
)
def test_guided_steps_are_those_of_the_interval(
    scale: float, interval: tuple[int, int] | None, expected: range
) -> None:
    assert guided_steps([999, 800, 600, 200, 0], scale, interval) == expected


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_guided_steps_of_a_sampler_show_timesteps_of_the_interval(sampler: str) -> None:
    timesteps = sampler_table(sampler, 37, NoiseSchedule.linear()).timesteps.tolist()
    guided = guided_steps(timesteps, 2.0, (100, 700))
    assert [100 <= timestep <= 700 for timestep in timesteps] == [i in guided for i in range(37)]


@pytest.mark.parametrize("interval", [(-1, 5), (5, 4), (0, 1000)], ids=str)
def test_an_interval_outside_of_the_process_is_refused(interval: tuple[int, int]) -> None:
    check_guidance_interval((0, 999), 1000)
    with pytest.raises(ValueError, match="timesteps from 0 to 999, the lower one first"):
        check_guidance_interval(interval, 1000)
