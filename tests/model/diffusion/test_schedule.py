"""If this fails, every sampler and the loss run another process than the one that weights were trained on."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from model.diffusion import NoiseSchedule, respaced_timesteps

TOLERANCE = 1e-12  # float64 tables, max abs: the order of a product over 1000 steps costs about 1e-15

TABLES = (
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
GOLDEN_SPACINGS = ("10", "50", "250", "ddim10", "ddim20", "ddim50")


@pytest.mark.parametrize("table", TABLES)
def test_noise_schedule_tables_equal_the_authors(
    schedule: NoiseSchedule, golden: dict[str, Tensor], table: str
) -> None:
    np.testing.assert_allclose(getattr(schedule, table), golden[table].numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", GOLDEN_SPACINGS)
def test_respaced_process_equals_the_authors(
    schedule: NoiseSchedule, golden: dict[str, Tensor], spacing: str
) -> None:
    steps = respaced_timesteps(spacing)
    assert list(steps) == golden[f"steps.{spacing}"].tolist()
    respaced = schedule.respaced(steps)
    assert respaced.timesteps == steps
    betas = golden[f"respaced_betas.{spacing}"].numpy()
    np.testing.assert_allclose(respaced.betas, betas, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["1", "7", "ddim8", "10,20,30", "1000"])
def test_respaced_process_keeps_the_noise_level_of_its_steps(schedule: NoiseSchedule, spacing: str) -> None:
    steps = respaced_timesteps(spacing)
    abar = schedule.respaced(steps).alphas_cumprod
    np.testing.assert_allclose(abar, schedule.alphas_cumprod[list(steps)], rtol=0, atol=TOLERANCE)


def test_respaced_twice_shows_the_step_numbers_of_the_full_process(schedule: NoiseSchedule) -> None:
    twice = schedule.respaced(range(0, 1000, 10)).respaced(range(0, 100, 5))
    assert twice.timesteps == tuple(range(0, 1000, 50))


def test_respaced_timesteps_spreads_any_count_over_the_whole_process() -> None:
    assert respaced_timesteps("1") == (0,)
    for count in range(2, 1001):
        steps = respaced_timesteps(str(count))
        assert len(set(steps)) == count
        assert (steps[0], steps[-1]) == (0, 999)
        assert list(steps) == sorted(steps)


def test_respaced_timesteps_gives_each_section_its_count() -> None:
    steps = respaced_timesteps("2,3,1", num_train_timesteps=10)  # sections 0..3, 4..6, 7..9
    assert steps == (0, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("ddim300", "no integer stride takes 300 of 1000 steps"),
        ("ddim1", "no integer stride takes 1 of 1000 steps"),
        ("1001", "section 1 of 1 has 1000 steps and accepts 1 to 1000"),
        ("10,501", "section 2 of 2 has 500 steps and accepts 1 to 500"),
        ("0", "counts of at least 1"),
        ("-5", "counts of at least 1"),
        ("", "counts of at least 1"),
        ("10,", "counts of at least 1"),
        ("ddim", "counts of at least 1"),
        ("fast", "counts of at least 1"),
        ("2.5", "counts of at least 1"),
    ],
)
def test_respaced_timesteps_refuses_what_has_no_answer(spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"spacing: '{spacing}' given; .*{message}"):
        respaced_timesteps(spacing)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 2], [-1, 4], [0, 1000]], ids=str)
def test_respaced_refuses_steps_that_are_not_ascending_steps_of_the_process(
    schedule: NoiseSchedule, timesteps: list[int]
) -> None:
    with pytest.raises(
        ValueError, match=r"timesteps: \[.*\] given; strictly ascending numbers from 0 to 999"
    ):
        schedule.respaced(timesteps)


def test_noise_schedule_refuses_betas_that_make_no_process() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps: 0 given; at least 1"):
        NoiseSchedule.linear(0)
    with pytest.raises(ValueError, match=r"beta_values: 0\.0 to 0\.02 given; values above 0 and below 1"):
        NoiseSchedule.linear(10, beta_start=0.0)
    with pytest.raises(ValueError, match="beta_values: 2 given for 1 timesteps"):
        NoiseSchedule(beta_values=(0.1, 0.2), timesteps=(0,))


def test_noise_schedule_is_a_value(schedule: NoiseSchedule) -> None:
    again = NoiseSchedule.linear()
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again != schedule.respaced(range(999))
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.0
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.0


def test_noise_schedule_of_one_step_has_finite_tables(schedule: NoiseSchedule) -> None:
    one = schedule.respaced([999])
    assert np.isfinite(one.posterior_log_variance_clipped).all()
    assert np.isfinite(one.log_betas).all()
