"""If this fails, images in a batch disturb each other, or unguided ones cost as much as guided ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from model.diffusion import (
    NoiseSchedule,
    StepBatch,
    denoise_step,
    gaussian_noise,
    guided_eps,
    sampler_step,
    sampler_table,
)

NULL_LABEL = 21
SHAPE = (4, 8, 8)


@dataclass
class _Output:
    sample: Tensor


@dataclass
class _FakeNetwork:
    """A row-wise function of all its inputs that records what it was called with."""

    dtype: torch.dtype = torch.float32
    learn_sigma: bool = True
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> _Output:
        self.calls.append((hidden_states, timestep, class_labels))
        shift = (class_labels / 10 - timestep / 1000).to(hidden_states.dtype).view(-1, 1, 1, 1)
        eps = torch.sin(hidden_states + shift)
        return _Output(torch.cat([eps, torch.cos(eps)], dim=1) if self.learn_sigma else eps)


def _batch(schedule: NoiseSchedule, guidance_scale: list[float]) -> StepBatch:
    """Images of three samplers at different steps."""
    steps = [
        (sampler_table("ddpm", 250, schedule), 3),
        (sampler_table("dpm++", 20, schedule), 7),
        (sampler_table("ddim", 50, schedule, eta=0.5), 0),
        (sampler_table("dpm++", 12, schedule), 11),
    ]
    scale = torch.tensor(guidance_scale)
    seeds, zeros = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    return StepBatch(
        latents=gaussian_noise(seeds, zeros, zeros, SHAPE),
        history=gaussian_noise(seeds, zeros, zeros + 1, SHAPE),
        timesteps=torch.stack([table.timesteps[i] for table, i in steps]),
        coefficients=torch.stack([table.coefficients[i] for table, i in steps]),
        class_labels=torch.tensor([0, 5, 20, 7]),
        guidance_scale=scale,
        guided=(scale != 1).nonzero()[:, 0],
        noise=gaussian_noise(seeds, zeros, zeros + 2, SHAPE),
    )


def _alone(batch: StepBatch, i: int) -> StepBatch:
    rows = slice(i, i + 1)
    assert batch.noise is not None
    return StepBatch(
        latents=batch.latents[rows],
        history=batch.history[rows],
        timesteps=batch.timesteps[rows],
        coefficients=batch.coefficients[rows],
        class_labels=batch.class_labels[rows],
        guidance_scale=batch.guidance_scale[rows],
        guided=(batch.guidance_scale[rows] != 1).nonzero()[:, 0],
        noise=batch.noise[rows],
    )


@pytest.mark.parametrize(
    ("guidance_scale", "rows"),
    [([1, 1, 1, 1], 4), ([4, 1, 1, 1.5], 6), ([4, 4, 4, 4], 8), ([0, 1, 1, 1], 5)],
    ids=str,
)
def test_denoise_step_calls_the_network_once_with_one_more_row_a_guided_image(
    schedule: NoiseSchedule, guidance_scale: list[float], rows: int
) -> None:
    network, batch = _FakeNetwork(), _batch(schedule, guidance_scale)
    denoise_step(network, batch, null_label=NULL_LABEL)
    [(hidden_states, timestep, class_labels)] = network.calls
    assert len(hidden_states) == len(timestep) == len(class_labels) == rows
    assert torch.equal(class_labels[:4], batch.class_labels)
    assert (class_labels[4:] == NULL_LABEL).all()
    assert torch.equal(hidden_states[4:], batch.latents[batch.guided])
    assert torch.equal(timestep[4:], batch.timesteps[batch.guided])


@pytest.mark.parametrize("guidance_channels", [None, 3])
def test_denoise_step_is_network_then_guidance_then_sampler(
    schedule: NoiseSchedule, guidance_channels: int | None
) -> None:
    network, batch = _FakeNetwork(), _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    latents, history = denoise_step(
        network, batch, null_label=NULL_LABEL, guidance_channels=guidance_channels
    )
    eps, v = network(batch.latents, batch.timesteps, batch.class_labels).sample.chunk(2, dim=1)
    null = torch.full_like(batch.class_labels, NULL_LABEL)
    uncond = network(batch.latents, batch.timesteps, null).sample[:, :4]
    guided = guided_eps(eps, uncond, batch.guidance_scale, guidance_channels)
    eps = torch.where((batch.guidance_scale != 1).view(-1, 1, 1, 1), guided, eps)
    expected = sampler_step(batch.latents, eps, v, batch.history, batch.noise, batch.coefficients)
    assert torch.equal(latents, expected[0])
    assert torch.equal(history, expected[1])


def test_denoise_step_with_a_guidance_network_steps_away_from_it(schedule: NoiseSchedule) -> None:
    """It sees the guided images alone, with their own labels, in its dtype; variances are the network's."""
    network, guidance_network = _FakeNetwork(), _FakeNetwork(torch.float64, learn_sigma=False)
    batch = _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    latents, history = denoise_step(network, batch, null_label=NULL_LABEL, guidance_network=guidance_network)
    assert [len(call[0]) for call in network.calls] == [4]
    [(hidden_states, timestep, class_labels)] = guidance_network.calls
    assert torch.equal(hidden_states, batch.latents[[0, 2]].double())
    assert torch.equal(timestep, batch.timesteps[[0, 2]])
    assert torch.equal(class_labels, batch.class_labels[[0, 2]])
    eps, v = network(batch.latents, batch.timesteps, batch.class_labels).sample.chunk(2, dim=1)
    worse = guidance_network(hidden_states, timestep, class_labels).sample.float()
    eps = eps.clone()
    for guided, image in enumerate((0, 2)):
        scale = batch.guidance_scale[image]
        eps[image] = worse[guided] + scale * (eps[image] - worse[guided])
    expected = sampler_step(batch.latents, eps, v, batch.history, batch.noise, batch.coefficients)
    assert torch.equal(latents, expected[0])
    assert torch.equal(history, expected[1])


def test_denoise_step_without_guided_images_leaves_the_guidance_network_alone(
    schedule: NoiseSchedule,
) -> None:
    guidance_network, batch = _FakeNetwork(), _batch(schedule, [1.0] * 4)
    given = denoise_step(_FakeNetwork(), batch, null_label=NULL_LABEL, guidance_network=guidance_network)
    assert not guidance_network.calls
    expected = denoise_step(_FakeNetwork(), batch, null_label=NULL_LABEL)
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))


def test_denoise_step_of_an_image_is_the_same_in_any_batch(schedule: NoiseSchedule) -> None:
    batch = _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    together = denoise_step(_FakeNetwork(), batch, null_label=NULL_LABEL)
    for i in range(4):
        alone = denoise_step(_FakeNetwork(), _alone(batch, i), null_label=NULL_LABEL)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_denoise_step_accepts_repeated_guided_images_as_padding(schedule: NoiseSchedule) -> None:
    batch = _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    padded = replace(batch, guided=torch.tensor([0, 2, 2, 2]))
    expected = denoise_step(_FakeNetwork(), batch, null_label=NULL_LABEL)[0]
    assert torch.equal(denoise_step(_FakeNetwork(), padded, null_label=NULL_LABEL)[0], expected)


def test_denoise_step_runs_only_the_network_in_the_networks_dtype(schedule: NoiseSchedule) -> None:
    network, batch = _FakeNetwork(dtype=torch.bfloat16), _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    latents, history = denoise_step(network, batch, null_label=NULL_LABEL)
    assert network.calls[0][0].dtype == torch.bfloat16
    assert latents.dtype == history.dtype == torch.float32


def test_denoise_step_takes_a_network_without_learned_variance(schedule: NoiseSchedule) -> None:
    batch = _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    deterministic = replace(batch, coefficients=sampler_table("dpm++", 4, schedule).coefficients, noise=None)
    fixed = denoise_step(_FakeNetwork(learn_sigma=False), deterministic, null_label=NULL_LABEL)
    learned = denoise_step(_FakeNetwork(), deterministic, null_label=NULL_LABEL)
    assert torch.equal(fixed[0], learned[0])
    assert denoise_step(_FakeNetwork(learn_sigma=False), batch, null_label=NULL_LABEL)[0].isfinite().all()


def test_denoise_step_changes_none_of_its_inputs(schedule: NoiseSchedule) -> None:
    batch, before = _batch(schedule, [4.0, 1.0, 2.0, 1.0]), _batch(schedule, [4.0, 1.0, 2.0, 1.0])
    denoise_step(_FakeNetwork(), batch, null_label=NULL_LABEL)
    for name, value in vars(before).items():
        assert torch.equal(getattr(batch, name), value), name


@pytest.mark.parametrize("guidance_scale", [[1, 1, 1, 1], [4, 1, 2, 1]], ids=str)
def test_denoise_step_compiles_without_graph_breaks(
    schedule: NoiseSchedule, guidance_scale: list[float]
) -> None:
    batch = _batch(schedule, guidance_scale)
    compiled = torch.compile(denoise_step, fullgraph=True, backend="eager")
    results = [step(_FakeNetwork(), batch, null_label=NULL_LABEL) for step in (compiled, denoise_step)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
