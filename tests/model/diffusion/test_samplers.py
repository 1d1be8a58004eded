"""If this fails, images come out noisy, blurred or different from what the same weights give elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from model.diffusion import (
    SAMPLERS,
    Coefficient,
    NoiseSchedule,
    SamplerTable,
    diffusers_scheduler_config,
    sampler_step,
    sampler_table,
)

TOLERANCE = {  # max abs, fp32
    "golden step": 4e-6,  # measured 1.2e-6: roundings of numbers up to 10
    "golden x0": 2e-6,  # relative to max(1, |x0|), up to 500 at t = 999; measured 7e-7
    "diffusers": 4e-5,  # whole trajectories; measured 1.3e-5: diffusers' tables are products in fp32
    "recovery": 4e-6,  # of x0 of size 2; measured 1.3e-6
    # From t = 999 straight to x0, a difference of numbers around 157 * 3, whose fp32 spacing is 3e-5:
    # measured 5.9e-5.
    "single step": 1.5e-4,
}
SHAPE = (3, 4, 8, 8)


def _fake_model(x: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """eps and v of a smooth model that behaves as a trained one does: eps is near x where t is high."""
    abar = torch.tensor(schedule.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    eps = (1 - abar).sqrt() / (0.6 * abar + 1 - abar) * x + 0.1 * abar * torch.sin(3 * x)
    return eps, 1.1 * torch.tanh(x - t.view(-1, 1, 1, 1) / 1000)


def _gaussian(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sample(table: SamplerTable, schedule: NoiseSchedule, x: Tensor) -> list[Tensor]:
    """The latents after each step; step i draws the noise of seed i."""
    history, trajectory = torch.full_like(x, torch.nan), []
    for i, t in enumerate(table.timesteps):
        eps, v = _fake_model(x, t.expand(len(x)), schedule)
        noise = _gaussian(i, tuple(x.shape)) if table.stochastic else None
        x, history = sampler_step(x, eps, v, history, noise, table.coefficients[i].expand(len(x), -1))
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize(
    ("name", "sampler", "eta", "spacing"),
    [
        ("ddpm", "ddpm", 0.0, None),
        ("ddim_eta0", "ddim", 0.0, "leading"),
        ("ddim_eta05", "ddim", 0.5, "leading"),
        ("ddim_eta0_even", "ddim", 0.0, "linspace"),
    ],
)
def test_sampler_step_equals_the_authors(
    schedule: NoiseSchedule,
    golden: dict[str, Tensor],
    name: str,
    sampler: str,
    eta: float,
    spacing: str | None,
) -> None:
    """Each step from the authors' latents: with stored outputs, rounding grows 157-fold over a trajectory."""
    table = sampler_table(sampler, 10, schedule, eta=eta, timestep_spacing=spacing)
    assert table.timesteps.tolist() == golden[f"{name}.t"].tolist()
    x, output, noise = golden[f"{name}.x"], golden[f"{name}.model_out"], golden[f"{name}.noise"]
    for i in range(10):
        eps, v = output[i].chunk(2, dim=1)
        following, x0 = sampler_step(
            x[i], eps, v, torch.zeros_like(eps), noise[i], table.coefficients[i].expand(len(eps), -1)
        )
        assert (following - x[i + 1]).abs().max() < TOLERANCE["golden step"], i
        expected = golden[f"{name}.pred_x0"][i]
        assert ((x0 - expected).abs() / expected.abs().clamp(min=1)).max() < TOLERANCE["golden x0"], i


def test_sampler_step_learned_range_equals_the_authors(
    schedule: NoiseSchedule, golden: dict[str, Tensor]
) -> None:
    """The mean and standard deviation of single steps of the full process, t = 1 to 999."""
    table = sampler_table("ddpm", 1000, schedule)
    t, x = golden["post.t"], golden["post.xt"]
    eps, v = golden["range.model_out"].chunk(2, dim=1)
    rows = table.coefficients.flip(0)[t]
    zero = torch.zeros_like(x)
    mean, x0 = sampler_step(x, eps, v, zero, zero, rows)
    assert (mean - golden["range.mean"]).abs().max() < TOLERANCE["golden step"]
    expected = golden["range.pred_x0"]
    assert ((x0 - expected).abs() / expected.abs().clamp(min=1)).max() < TOLERANCE["golden x0"]
    noisy, _ = sampler_step(zero, zero, v, zero, zero + 1, rows)
    used = t > 0
    deviation = golden["range.variance"].sqrt()
    assert (noisy[used] - deviation[used]).abs().max() < TOLERANCE["golden step"]
    assert (noisy[~used] == 0).all()


def _linear(**extra: object) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        **extra,
    }


def _diffusers_sample(
    scheduler: Any,
    schedule: NoiseSchedule,
    x: Tensor,
    step: Callable[[Tensor, Tensor, Tensor, Tensor, int], Any],
) -> list[Tensor]:
    trajectory = []
    for i, t in enumerate(scheduler.timesteps):
        eps, v = _fake_model(x, t.expand(len(x)), schedule)
        x = step(eps, v, t, x, i).prev_sample
        trajectory.append(x)
    return trajectory


def _assert_same(table: SamplerTable, ours: list[Tensor], scheduler: Any, theirs: list[Tensor]) -> None:
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    allowed = TOLERANCE["single step" if len(ours) == 1 else "diffusers"]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).abs().max() < allowed, i


@pytest.mark.parametrize("spacing", ["linspace", "leading"])  # its trailing adds noise at the last step
@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_equals_diffusers(schedule: NoiseSchedule, steps: int, spacing: str) -> None:
    scheduler: Any = DDPMScheduler(
        **_linear(variance_type="learned_range", clip_sample=False, timestep_spacing=spacing)
    )
    scheduler.set_timesteps(steps)

    def step(eps: Tensor, v: Tensor, t: Tensor, x: Tensor, i: int) -> Any:
        return scheduler.step(torch.cat([eps, v], 1), t, x, generator=torch.Generator().manual_seed(i))

    table = sampler_table("ddpm", steps, schedule, timestep_spacing=spacing)
    theirs = _diffusers_sample(scheduler, schedule, _gaussian(-1), step)
    _assert_same(table, _sample(table, schedule, _gaussian(-1)), scheduler, theirs)


@pytest.mark.parametrize(  # with linspace, diffusers' DDIM does not step to its own next timestep
    ("steps", "spacing"),
    [(1, "trailing"), *((steps, spacing) for steps in (2, 10, 50) for spacing in ("trailing", "leading"))],
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(schedule: NoiseSchedule, steps: int, eta: float, spacing: str) -> None:
    scheduler: Any = DDIMScheduler(
        **_linear(clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)
    )
    scheduler.set_timesteps(steps)

    def step(eps: Tensor, v: Tensor, t: Tensor, x: Tensor, i: int) -> Any:
        return scheduler.step(eps, t, x, eta=eta, variance_noise=_gaussian(i))

    table = sampler_table("ddim", steps, schedule, eta=eta, timestep_spacing=spacing)
    theirs = _diffusers_sample(scheduler, schedule, _gaussian(-1), step)
    _assert_same(table, _sample(table, schedule, _gaussian(-1)), scheduler, theirs)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50])
def test_dpm_solver_equals_diffusers(schedule: NoiseSchedule, steps: int, spacing: str) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(**_linear(timestep_spacing=spacing))
    scheduler.set_timesteps(steps)

    def step(eps: Tensor, v: Tensor, t: Tensor, x: Tensor, i: int) -> Any:
        return scheduler.step(eps, t, x)

    table = sampler_table("dpm++", steps, schedule, timestep_spacing=spacing)
    theirs = _diffusers_sample(scheduler, schedule, _gaussian(-1), step)
    _assert_same(table, _sample(table, schedule, _gaussian(-1)), scheduler, theirs)


def test_timesteps_equal_diffusers_for_every_number_of_steps(schedule: NoiseSchedule) -> None:
    ddim: Any = DDIMScheduler(**_linear(timestep_spacing="trailing"))
    dpm: Any = DPMSolverMultistepScheduler(**_linear())
    for steps in range(1, 1000):
        ddim.set_timesteps(steps)
        # a rounding of T / n sometimes gives diffusers an extra step, -1
        assert sampler_table("ddim", steps, schedule).timesteps.tolist() == ddim.timesteps.tolist()[:steps]
        dpm.set_timesteps(steps)
        assert sampler_table("dpm++", steps, schedule).timesteps.tolist() == dpm.timesteps.tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_table_is_sound_for_every_number_of_steps(schedule: NoiseSchedule, sampler: str) -> None:
    for steps in range(1, 1001):
        table = sampler_table(sampler, steps, schedule, eta=1.0 if sampler == "ddim" else 0.0)
        timesteps, coefficients = table.timesteps, table.coefficients
        assert timesteps.shape == (steps,)
        assert coefficients.shape == (steps, len(Coefficient))
        assert coefficients.dtype == torch.float32
        assert coefficients.isfinite().all()
        assert timesteps[0] == 999
        assert (timesteps.diff() < 0).all()
        assert timesteps[-1] >= 0
        assert coefficients[-1, Coefficient.NOISE] == 0
        assert (coefficients[[0, -1], Coefficient.HISTORY] == 0).all()
        assert table.stochastic == (sampler != "dpm++" and steps > 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 100, 999, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_recovers_a_distribution_of_one_image(
    schedule: NoiseSchedule, sampler: str, steps: int
) -> None:
    """With the exact eps of a single image every sampler must end at it, whatever the noise and the steps."""
    image, x = 2 * _gaussian(1), _gaussian(2)
    table = sampler_table(sampler, steps, schedule, eta=0.7 if sampler == "ddim" else 0.0)
    abar = torch.tensor(schedule.alphas_cumprod)[table.timesteps]
    signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
    history, v = torch.full_like(x, torch.nan), torch.zeros_like(x)
    for i in range(steps):
        eps = (x - signal[i] * image) / sigma[i]
        noise = _gaussian(i) if table.stochastic else None
        x, history = sampler_step(x, eps, v, history, noise, table.coefficients[i].expand(len(x), -1))
    assert (x - image).abs().max() < TOLERANCE["single step" if steps == 1 else "recovery"]


def test_sampler_step_rows_do_not_see_each_other(schedule: NoiseSchedule) -> None:
    """Samplers, step counts and positions mixed in a batch; each row bit-equal to the row alone."""
    rows = [
        (sampler_table("ddpm", 250, schedule), 0),
        (sampler_table("dpm++", 20, schedule), 7),
        (sampler_table("ddim", 50, schedule, eta=0.5), 49),
        (sampler_table("ddpm", 10, schedule), 9),
        (sampler_table("dpm++", 1, schedule), 0),
        (sampler_table("ddim", 3, schedule), 1),
    ]
    coefficients = torch.stack([table.coefficients[i] for table, i in rows])
    shape = (len(rows), 4, 8, 8)
    inputs = [*(_gaussian(seed, shape) for seed in range(5)), coefficients]
    together = sampler_step(*inputs)
    for i in range(len(rows)):
        alone = sampler_step(*(tensor[i : i + 1] for tensor in inputs))
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])
    inputs[0][1:], inputs[3][1:] = torch.nan, torch.nan
    assert torch.equal(sampler_step(*inputs)[0][0], together[0][0])


def test_sampler_step_does_not_read_what_a_row_has_no_use_for(schedule: NoiseSchedule) -> None:
    """Stale history, noise and any v reach no row whose coefficients for them are 0."""
    cases = [
        (sampler_table("ddpm", 10, schedule), 9),  # no noise at the last step
        (sampler_table("ddim", 10, schedule), 4),
        (sampler_table("dpm++", 10, schedule), 0),
        (sampler_table("dpm++", 10, schedule), 9),
    ]
    coefficients = torch.stack([table.coefficients[i] for table, i in cases])
    x, eps = _gaussian(0, (4, 4, 8, 8)), _gaussian(1, (4, 4, 8, 8))
    zero = torch.zeros_like(x)
    expected = sampler_step(x, eps, zero, zero, None, coefficients)[0]
    for stale in (torch.nan, torch.inf, 1e30):
        garbage = torch.full_like(x, stale)
        assert torch.equal(sampler_step(x, eps, garbage, garbage, garbage, coefficients)[0], expected)


def test_ddim_does_not_use_the_variance(schedule: NoiseSchedule) -> None:
    table = sampler_table("ddim", 10, schedule, eta=1.0)
    x, eps, noise = (_gaussian(seed, (10, 4, 8, 8)) for seed in range(3))
    results = [
        sampler_step(x, eps, x * 0 + v, x * 0, noise, table.coefficients)[0] for v in (0.0, -40.0, 1e6)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sampler_step_without_learned_variance_takes_the_larger(schedule: NoiseSchedule) -> None:
    coefficients = sampler_table("ddpm", 10, schedule).coefficients
    x, eps, noise = (_gaussian(seed, (10, 4, 8, 8)) for seed in range(3))
    fixed = sampler_step(x, eps, None, x * 0, noise, coefficients)[0]
    learned = sampler_step(x, eps, torch.ones_like(x), x * 0, noise, coefficients)[0]
    torch.testing.assert_close(fixed, learned)


def test_sampler_step_compiles_without_graph_breaks(schedule: NoiseSchedule) -> None:
    coefficients = sampler_table("ddpm", 10, schedule).coefficients[:3]
    inputs = [*(_gaussian(seed) for seed in range(5)), coefficients]
    compiled = torch.compile(sampler_step, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*inputs), sampler_step(*inputs), strict=True):
        assert torch.equal(a, b)


def test_sampler_table_is_cached_by_value() -> None:
    first = sampler_table("dpm++", 20, NoiseSchedule.linear())
    assert sampler_table("dpm++", 20, NoiseSchedule.linear(), timestep_spacing="linspace") is first


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("dpm++", 5000), {}, r"num_inference_steps: 5000 given; this process accepts 1 to 1000"),
        (("ddim", 0), {}, r"num_inference_steps: 0 given; this process accepts 1 to 1000"),
        (("euler", 10), {}, r"sampler: 'euler' given; accepted are ddpm, ddim, dpm\+\+"),
        (("ddim", 10), {"eta": 1.5}, r"eta: 1\.5 given; ddim accepts 0 to 1"),
        (("ddim", 10), {"eta": float("nan")}, r"eta: nan given; ddim accepts 0 to 1"),
        (("ddpm", 10), {"eta": 0.5}, r"eta: 0\.5 given; ddpm accepts 0 alone"),
        (
            ("ddim", 10),
            {"timestep_spacing": "karras"},
            r"timestep_spacing: 'karras' given; accepted are linspace",
        ),
        (("ddim", 300), {"timestep_spacing": "leading"}, r"no integer stride takes 300 of 1000 steps"),
        (
            ("dpm++", 1000),
            {"timestep_spacing": "leading"},
            r"dpm\+\+ with leading timesteps accepts 1 to 999",
        ),
    ],
)
def test_sampler_table_refuses_what_it_cannot_do(
    schedule: NoiseSchedule, arguments: tuple[str, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_table(*arguments, schedule, **options)


def test_diffusers_scheduler_config_loads_as_the_same_sampler(
    schedule: NoiseSchedule, tmp_path: Path
) -> None:
    config = diffusers_scheduler_config(schedule)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler: Any = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert scheduler.config.variance_type is None  # with learned_range it would keep 3 of our 4 channels
    assert {key: scheduler.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }
    np.testing.assert_allclose(scheduler.betas.numpy(), schedule.betas, rtol=1e-6)
    with pytest.raises(ValueError, match="a full process of linear betas is accepted"):
        diffusers_scheduler_config(schedule.respaced(range(0, 1000, 10)))
