"""If this fails, training follows another schedule than its configuration says, or a bad step ruins a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.averaged_adamw import AveragedAdamW
from model.cuda_graph import CapturedStep, restored

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = ((3, 4), (5,), ())
# Maximum relative difference after five steps. The learning rate and the weight of the average are fp32 here,
# and the average's difference is rounded before it is added: a few units of 2**-24 each.
TOLERANCE = 1e-6


def _parameters(device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in SHAPES]


def _optimizer(
    parameters: list[Tensor],
    *,
    captured: bool = False,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
) -> AveragedAdamW:
    return AveragedAdamW(
        parameters,
        [parameter.detach().clone() for parameter in parameters],
        betas=betas,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        average_decay=0.3,
        captured=captured,
    )


def _set_gradients(parameters: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e6, math.inf], ids=["clips", "could_clip", "never_clips"])
def test_step_equals_adamw_with_a_float_learning_rate(max_grad_norm: float) -> None:
    """And with torch's clipping; a parameter without a gradient is left alone."""
    ours, theirs = _parameters(), _parameters()
    optimizer = _optimizer(ours, max_grad_norm=max_grad_norm)
    adamw = torch.optim.AdamW(theirs, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = [parameter.detach().clone() for parameter in theirs]
    for step in range(5):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        ours[-1].grad = theirs[-1].grad = None
        optimizer.schedule(learning_rate=0.1 / (step + 1), step=step)
        norm = optimizer.step()
        assert all(parameter.grad is None for parameter in ours)

        expected = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        adamw.param_groups[0]["lr"] = 0.1 / (step + 1)
        adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, theirs, 1 - min(0.3, (1 + step) / (10 + step)))
        assert norm == expected
    for a, b in zip([*ours, *optimizer.average], [*theirs, *average], strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    assert optimizer.skipped_steps == 0


def test_step_skips_gradients_that_are_not_finite() -> None:
    parameters = _parameters()
    optimizer = _optimizer(parameters)
    _set_gradients(parameters, 0)
    optimizer.schedule(learning_rate=0.1, step=0)
    optimizer.step()
    kept = (*parameters, *optimizer.average, *optimizer.state_dict()["state"][0].values())
    assert not torch.equal(optimizer.average[0], parameters[0])  # so that the average has somewhere to go
    before = [tensor.clone() for tensor in kept]
    _set_gradients(parameters, 1)
    assert parameters[1].grad is not None
    parameters[1].grad[2] = torch.inf
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert [float(optimizer.skipped), float(optimizer.skipped_steps)] == [1, 1]
    _set_gradients(parameters, 2)
    optimizer.step()
    assert [float(optimizer.skipped), float(optimizer.skipped_steps)] == [0, 1]
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=False))


def test_state_is_all_that_a_step_changes() -> None:
    """A first step that is undone leaves no trace: the next is that of an optimizer without it."""
    runs = []
    for undone_steps in (0, 2):
        parameters = _parameters()
        optimizer = _optimizer(parameters)
        optimizer.schedule(learning_rate=0.1, step=0)
        with restored(optimizer.state()):
            for step in range(undone_steps):
                _set_gradients(parameters, 10 + step)
                optimizer.step()
        _set_gradients(parameters, 0)
        optimizer.step()
        runs.append(optimizer.state())
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("captured", [False, True], ids=["called", "captured"])
def test_load_state_dict_keeps_the_device_scalars(captured: bool) -> None:
    """Hyperparameters of the run that saved must not take the place of this run's."""
    parameters = _parameters()
    saved = _optimizer(parameters, captured=not captured)
    _set_gradients(parameters, 0)
    saved.schedule(learning_rate=0.1, step=0)
    saved.step()
    state = saved.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    again = _optimizer(parameters, captured=captured)
    again.load_state_dict(state)
    before = [parameter.detach().clone() for parameter in parameters]
    again.schedule(learning_rate=0.0, step=1)
    _set_gradients(parameters, 1)
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert again.state_dict()["state"][0]["step"] == 2
    assert again.state_dict()["param_groups"][0]["capturable"] is captured


def test_load_state_dict_keeps_the_settings_and_takes_the_count() -> None:
    """A resumed run with other settings is, but for the moments, a run with these settings."""
    parameters = _parameters()
    saved = _optimizer(parameters)
    saved.schedule(learning_rate=0.1, step=0)
    for step in range(3):
        _set_gradients(parameters, step)
        if step == 1:
            assert parameters[0].grad is not None
            parameters[0].grad.fill_(torch.nan)
        saved.step()
    again = _optimizer(parameters, betas=(0.5, 0.75), weight_decay=0.5)
    again.load_state_dict(saved.state_dict())
    assert again.skipped_steps == 1
    group = again.state_dict()["param_groups"][0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.75), 0.5)

    again.schedule(learning_rate=0.1, step=2)
    moment = again.state_dict()["state"][0]["exp_avg"].clone()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    again.step()
    torch.testing.assert_close(again.state_dict()["state"][0]["exp_avg"], 0.5 * moment)


@pytest.mark.gpu
@needs_cuda
def test_captured_step_follows_schedule_and_skips() -> None:
    """Replays equal calls: learning rates, decays and a step that is skipped are read on the device."""
    runs = []
    for captured in (False, True):
        parameters = _parameters("cuda")
        optimizer = _optimizer(parameters, captured=captured)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]

        def step(
            parameters: list[Tensor] = parameters,
            gradients: list[Tensor] = gradients,
            optimizer: AveragedAdamW = optimizer,
        ) -> Tensor:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            return optimizer.step()

        take_step = CapturedStep(step, optimizer.state()) if captured else step
        for index, learning_rate in enumerate((0.1, 0.0, 0.2, 0.3, 0.01)):
            _set_gradients(parameters, index)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert parameter.grad is not None
                gradient.copy_(parameter.grad if index != 3 else torch.full_like(gradient, torch.nan))
                parameter.grad = None
            optimizer.schedule(learning_rate=learning_rate, step=index)
            take_step()
        assert optimizer.skipped_steps == 1
        runs.append(optimizer.state())
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
