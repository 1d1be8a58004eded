"""If this fails, training optimises something else than the authors did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.diffusion import LossTables, NoiseSchedule, diffusion_loss, q_sample

TOLERANCE = {  # max abs, fp32
    "loss": 1e-6,  # of values around 1; measured 3e-7
    "gradient": 2e-7,  # of values up to 0.03; measured 7e-8
    "mean": 2e-6,  # of values around 3
}
SHAPE = (4, 4, 4)


@pytest.fixture(scope="module")
def tables(schedule: NoiseSchedule) -> LossTables:
    return LossTables.from_schedule(schedule)


def _inputs(t: list[int], tables: LossTables) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """model_output, x0, x_t, noise, t of a network that is nearly right."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor(t)
    x0, noise, error, v = torch.randn(4, len(t), *SHAPE, generator=generator)
    model_output = torch.cat([noise + 0.1 * error, v.tanh()], dim=1)
    return model_output, x0, q_sample(x0, noise, steps, tables), noise, steps


def test_diffusion_loss_equals_the_authors(golden: dict[str, Tensor], tables: LossTables) -> None:
    """t = 0 (twice), 1, 10, 250, 999, with values beyond +-0.999 at t = 0."""
    model_output = golden["loss.model_out"].clone().requires_grad_()
    x0, x_t, noise, t = (golden[f"loss.{name}"] for name in ("x0", "xt", "noise", "t"))
    result = diffusion_loss(model_output, x0, x_t, noise, t, tables)
    for name in ("loss", "mse", "vb"):
        assert (getattr(result, name) - golden[f"loss.{name}"]).abs().max() < TOLERANCE["loss"], name
    result.loss.sum().backward()
    assert model_output.grad is not None
    assert (model_output.grad - golden["loss.grad"]).abs().max() < TOLERANCE["gradient"]


def test_q_sample_equals_the_authors(golden: dict[str, Tensor], tables: LossTables) -> None:
    x_t = q_sample(golden["loss.x0"], golden["loss.noise"], golden["loss.t"], tables)
    torch.testing.assert_close(x_t, golden["loss.xt"], rtol=0, atol=1e-6)


def test_loss_tables_make_the_authors_posterior(golden: dict[str, Tensor], tables: LossTables) -> None:
    t, x0, x_t = golden["post.t"], golden["post.x0"], golden["post.xt"]
    weights = (
        table[t].view(-1, 1, 1, 1) for table in (tables.posterior_mean_coef1, tables.posterior_mean_coef2)
    )
    mean = next(weights) * x0 + next(weights) * x_t
    assert (mean - golden["post.mean"]).abs().max() < TOLERANCE["mean"]
    torch.testing.assert_close(tables.min_log_variance[t], golden["post.log_variance_clipped"])


def test_diffusion_loss_bound_teaches_the_variance_alone(tables: LossTables) -> None:
    """VB has no gradient to eps, and the squared error none to v."""
    model_output, x0, x_t, noise, t = _inputs([0, 1, 500, 999], tables)
    model_output.requires_grad_()
    result = diffusion_loss(model_output, x0, x_t, noise, t, tables)
    (of_vb,) = torch.autograd.grad(result.vb.sum(), model_output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(result.mse.sum(), model_output)
    assert (of_vb[:, :4] == 0).all()
    assert (of_vb[:, 4:] != 0).any(dim=1).all()
    assert (of_mse[:, 4:] == 0).all()
    torch.testing.assert_close(of_mse[:, :4], 2 * (model_output[:, :4] - noise).detach() / 64)


def test_diffusion_loss_bound_is_zero_for_the_true_posterior(tables: LossTables) -> None:
    model_output, x0, x_t, noise, t = _inputs([1, 10, 500, 999], tables)
    exact = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # v = -1: the posterior's own variance
    result = diffusion_loss(exact, x0, x_t, noise, t, tables)
    assert (result.mse == 0).all()
    assert result.vb.abs().max() < TOLERANCE["loss"]
    assert (diffusion_loss(model_output, x0, x_t, noise, t, tables).vb > result.vb).all()


def test_diffusion_loss_of_a_sample_is_the_same_in_any_batch(tables: LossTables) -> None:
    inputs = _inputs([0, 3, 999, 0, 77], tables)
    together = diffusion_loss(*inputs, tables)
    assert together.loss.shape == (5,)
    for i in range(5):
        model_output, x0, x_t, noise, t = (tensor[i : i + 1] for tensor in inputs)
        alone = diffusion_loss(model_output, x0, x_t, noise, t, tables)
        torch.testing.assert_close(alone.loss[0], together.loss[i], rtol=1e-6, atol=0)


def test_diffusion_loss_is_finite_far_from_the_data(tables: LossTables) -> None:
    model_output, x0, x_t, noise, t = _inputs([0, 0, 1, 999], tables)
    model_output = (20 * model_output).requires_grad_()
    result = diffusion_loss(model_output, x0, x_t, noise, t, tables)
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert model_output.grad is not None
    assert model_output.grad.isfinite().all()


def test_diffusion_loss_without_learned_variance_is_the_squared_error(tables: LossTables) -> None:
    model_output, x0, x_t, noise, t = _inputs([0, 500], tables)
    result = diffusion_loss(model_output[:, :4], x0, x_t, noise, t, tables)
    assert torch.equal(result.loss, diffusion_loss(model_output, x0, x_t, noise, t, tables).mse)
    assert (result.vb == 0).all()


def test_diffusion_loss_is_fp32_whatever_the_networks_dtype(tables: LossTables) -> None:
    model_output, x0, x_t, noise, t = _inputs([0, 500], tables)
    model_output = model_output.bfloat16()
    half = diffusion_loss(model_output, x0, x_t, noise, t, tables)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, diffusion_loss(model_output.float(), x0, x_t, noise, t, tables).loss)


def test_diffusion_loss_compiles_without_graph_breaks(tables: LossTables) -> None:
    inputs = _inputs([0, 1, 500, 999], tables)
    compiled = torch.compile(diffusion_loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs, tables).loss, diffusion_loss(*inputs, tables).loss)


def test_loss_tables_move_together(tables: LossTables) -> None:
    moved = tables.to("meta")
    assert all(table.device.type == "meta" for table in vars(moved).values())
    assert tables.sqrt_abar.device.type == "cpu"


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_diffusion_loss_by_min_snr_bounds_the_weight_of_x0s_error(
    schedule: NoiseSchedule, tables: LossTables, gamma: float
) -> None:
    """min(SNR, gamma) times the error of x_0, whose values follow from the schedule's float64 tables."""
    model_output, x0, x_t, noise, t = _inputs([0, 100, 300, 500, 999], tables)
    alone = diffusion_loss(model_output[:, :4], x0, x_t, noise, t, tables, min_snr_gamma=gamma)
    abar = torch.tensor(schedule.alphas_cumprod)[t]
    snr = abar / (1 - abar)
    eps = model_output[:, :4].double()
    scales = [value.sqrt()[:, None, None, None] for value in (1 - abar, abar)]
    x0_error = ((x_t.double() - scales[0] * eps) / scales[1] - x0).square().flatten(1).mean(1)
    expected = torch.minimum(snr, torch.tensor(gamma)) * x0_error
    torch.testing.assert_close(alone.loss.double(), expected, rtol=1e-4, atol=0)
    result = diffusion_loss(model_output, x0, x_t, noise, t, tables, min_snr_gamma=gamma)
    assert torch.equal(result.loss, alone.loss + result.vb)
    plain = diffusion_loss(model_output, x0, x_t, noise, t, tables)
    assert torch.equal(result.mse, plain.mse)
    assert torch.equal(result.vb, plain.vb)
    assert torch.equal(result.loss[-1], plain.loss[-1])  # SNR 4e-5 is below either gamma
