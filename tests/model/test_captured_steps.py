"""If these fail, a GPU's images depend on what else is in the batch, or on which batches came before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model import LaMambaDiff
from model.captured_steps import CapturedSteps
from model.cuda_graph import Captures
from model.diffusion.noise import gaussian_noise
from model.diffusion.samplers import sampler_table
from model.diffusion.schedule import NoiseSchedule
from model.diffusion.step import StepBatch, denoise_step

SHAPE = (4, 8, 8)
NULL_LABEL = 5


@pytest.fixture(scope="module")
def network() -> LaMambaDiff:
    torch.manual_seed(0)
    net = LaMambaDiff(sample_size=8, hidden_size=8, num_heads=2, window_size=4, num_classes=NULL_LABEL)
    for name, parameter in net.named_parameters():
        if ".modulation." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def _batch(num_images: int, guided: list[int], *, sampler: str = "ddpm", device: str = "cpu") -> StepBatch:
    """Images of seeds 0, 1, .. at different steps of a table."""
    table = sampler_table(sampler, 10, NoiseSchedule.linear())
    seeds = torch.arange(num_images)
    steps = torch.arange(num_images) % 9
    zeros = torch.zeros_like(seeds)
    noise = gaussian_noise(seeds, zeros, steps + 1, SHAPE)
    batch = StepBatch(
        latents=gaussian_noise(seeds, zeros, zeros, SHAPE),
        history=gaussian_noise(seeds, zeros + 1, zeros, SHAPE),
        timesteps=table.timesteps[steps],
        coefficients=table.coefficients[steps],
        class_labels=seeds % NULL_LABEL,
        guidance_scale=torch.where(torch.isin(seeds, torch.tensor(guided)), 3.0, 1.0),
        guided=torch.tensor(guided, dtype=torch.int64),
        noise=noise if table.stochastic else None,
    )
    fields = {name: None if value is None else value.to(device) for name, value in vars(batch).items()}
    return replace(batch, **fields)


BATCHES = [
    pytest.param([(3, [0, 2], "ddpm"), (4, [0, 1, 2, 3], "ddpm")], id="guided-in-part-then-whole"),
    pytest.param([(2, [0, 1], "ddpm"), (1, [0], "ddpm"), (2, [1], "dpm++")], id="sizes-in-turn"),
    pytest.param([(4, [], "ddpm"), (3, [], "dpm++"), (3, [1], "ddim")], id="with-and-without-noise"),
    pytest.param([(4, [1], "ddpm"), (3, [0, 2], "dpm++"), (4, [0, 1, 3], "ddim")], id="half-guided"),
    pytest.param([(6, [5], "dpm++")], id="more-than-captured"),
]


def _expected(network: LaMambaDiff, batch: StepBatch) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return denoise_step(network, batch, null_label=NULL_LABEL)


def _steps(network: LaMambaDiff, device: str) -> CapturedSteps:
    step = partial(denoise_step, network, null_label=NULL_LABEL)
    return CapturedSteps(step, latent_shape=SHAPE, device=torch.device(device), sizes=(1, 2, 4))


@pytest.mark.parametrize("batches", BATCHES)
def test_filled_up_steps_are_the_steps(
    network: LaMambaDiff, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the capture itself, on the CPU: what is copied in, filled up and copied out."""
    monkeypatch.setattr(Captures, "capture", lambda self, step: step)
    steps = _steps(network, "cpu")
    results = []
    for num_images, guided, sampler in batches:
        batch = _batch(num_images, guided, sampler=sampler)
        results.append((steps(batch), _expected(network, batch)))
    for ours, theirs in results:  # afterwards: a later step must not overwrite what an earlier one returned
        # More rows, another order of sums; x0 is eps times up to 150 at the first steps.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_size_is_captured_once_and_in_advance(
    network: LaMambaDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []
    monkeypatch.setattr(Captures, "capture", lambda self, step: captured.append(step) or step)
    steps = _steps(network, "cpu")
    list(steps.capture_all(max_images=2, conditional=True))
    assert len(captured) == 4  # 2 and 1 images, with guidance and without
    steps(_batch(2, [0]))
    steps(_batch(1, []))
    assert len(captured) == 4
    steps(_batch(3, []))
    assert len(captured) == 5
    list(steps.capture_all(max_images=100, conditional=True))
    assert len(captured) == 7  # of 4 images also with guidance for half of them


def test_a_step_that_would_be_mostly_filling_runs_uncaptured(
    network: LaMambaDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []
    monkeypatch.setattr(Captures, "capture", lambda self, step: captured.append(step) or step)
    monkeypatch.setattr("model.captured_steps._BUSY_ROWS", 3)
    steps = _steps(network, "cpu")
    batch = _batch(3, [1])  # 4 rows; its graph has 6
    torch.testing.assert_close(steps(batch), _expected(network, batch))
    assert captured == []
    steps(_batch(4, [0, 1, 2, 3]))
    assert len(captured) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batches", BATCHES)
def test_captured_steps_are_the_steps(network: LaMambaDiff, batches: list[Any]) -> None:
    net = LaMambaDiff.from_config(network.config).cuda().eval().requires_grad_(False)
    net.load_state_dict(network.state_dict())
    steps = _steps(net, "cuda")
    list(steps.capture_all(max_images=4, conditional=True))
    for num_images, guided, sampler in batches * 2:
        batch = _batch(num_images, guided, sampler=sampler, device="cuda")
        # TF32 and other kernels at other numbers of rows
        torch.testing.assert_close(steps(batch), _expected(net, batch), rtol=1e-2, atol=1e-2)


def test_num_rows_are_those_of_the_captured_size_or_of_the_batch() -> None:
    steps = CapturedSteps(
        lambda batch: (batch.latents, batch.history), latent_shape=SHAPE, device=torch.device("cpu")
    )
    assert [steps.num_rows(images, 0) for images in (1, 5, 9, 64, 65)] == [1, 6, 12, 64, 65]
    assert [steps.num_rows(5, guided) for guided in (1, 3, 4)] == [9, 9, 12]
    assert [steps.num_rows(16, guided) for guided in (8, 9)] == [24, 32]
    assert steps.num_rows(25, 25) == 50  # a graph of 32 images would cost more than its launches
