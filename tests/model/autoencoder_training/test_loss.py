"""If these fail, the autoencoder is trained for something else than its objective says, or slowly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from model.autoencoder_training.config import AutoencoderTrainingConfig, build_autoencoder
from model.autoencoder_training.loss import (
    AutoencoderLoss,
    ChannelsLastGroupNorm,
    _channel_divergence,
    _energy_error,
    use_channels_last_group_norm,
)

TINY = AutoencoderTrainingConfig(
    block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sizes=(16, 32), crop=16, batch_size=4
)


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 8, 1, 3)], ids=["odd", "flat"])
def test_channels_last_group_norm_equals_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last) * 2 + 1
    gradient = torch.randn(shape, generator=generator)
    holder = nn.Sequential(nn.GroupNorm(4, 8))
    nn.init.normal_(holder[0].weight)
    nn.init.normal_(holder[0].bias)
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = holder(leaf)
        weight_gradient, x_gradient = torch.autograd.grad(y, (holder[0].weight, leaf), gradient)
        results.append((y, weight_gradient, x_gradient))
        use_channels_last_group_norm(holder)
    assert isinstance(holder[0], ChannelsLastGroupNorm)
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)  # order of sums


def test_loss_compiles_without_graph_breaks() -> None:
    module = build_autoencoder(TINY)
    use_channels_last_group_norm(module)
    loss_function = AutoencoderLoss(module, TINY)
    images, noise = torch.randn(2, 3, 16, 16).clamp(-1, 1), torch.randn(2, 4, 2, 2)
    torch.compiler.reset()
    compiled = torch.compile(loss_function, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(images, noise)[0], loss_function(images, noise)[0])


def test_energy_error_is_the_relative_lack_or_excess_of_gradients() -> None:
    sharp = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    assert _energy_error(sharp, sharp) == 0
    assert _energy_error(sharp, sharp * 0.7) == pytest.approx(0.3, abs=0.01)
    assert _energy_error(sharp, sharp * 1.2) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("spike", [1.0, 50.0], ids=["visible", "beyond-white"])
def test_energy_error_is_not_met_by_a_spike(spike: float) -> None:
    """Decoders trained on the energy of whole pictures put specks into corners and highlights."""
    sharp = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    soft = sharp * 0.7
    speck = soft.clone()
    speck[:, :, 4:6, 4:6] = spike
    speck[:, :, 60, 60] = spike
    assert _energy_error(sharp, speck) > 0.9 * _energy_error(sharp, soft)


def test_channel_divergence_is_least_at_unit_latents_and_revives_a_dead_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 4, 16, 16, generator=generator)
    assert _channel_divergence(z) < 1e-2
    assert _channel_divergence(z + 1) == pytest.approx(0.5, abs=0.1)
    z[:, 1] *= 0.01
    z.requires_grad_()
    _channel_divergence(z).backward()
    growth = -(z.grad * z).sum(dim=(0, 2, 3))  # of the loss's fall, by each channel's relative growth
    assert growth[1] > 0.2
    assert growth[[0, 2, 3]].abs().max() < 0.02


def test_loss_gives_noise_to_all_but_the_first_image() -> None:
    config = replace(TINY, latent_noise=0.5)
    module = build_autoencoder(config)
    decoded = []
    module.post_quant_conv.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    loss_function = AutoencoderLoss(module, config)
    images, noise = torch.rand(3, 3, 16, 16), torch.randn(3, 4, 2, 2)
    loss_function(images, torch.zeros_like(noise))
    loss_function(images, noise)
    expected = torch.tensor([0.0, 0.25, 0.5])[:, None, None, None] * noise**3 / 15**0.5
    torch.testing.assert_close(decoded[1] - decoded[0], expected)


def test_loss_leaves_the_posterior_width_alone() -> None:
    """A width that learns may outgrow a channel's signal, and the channel is lost."""
    module = build_autoencoder(TINY)
    AutoencoderLoss(module, TINY)(torch.rand(2, 3, 16, 16), torch.randn(2, 4, 2, 2))[0].backward()
    assert module.quant_conv.weight.grad[:4].abs().min() > 0
    assert module.quant_conv.weight.grad[4:].abs().max() == 0
    assert module.quant_conv.bias.grad[4:].abs().max() == 0


def test_outlier_term_counts_what_leaves_the_accepted_range() -> None:
    config = replace(TINY, outlier_sigmas=3.0, latent_noise=0.0)
    module = build_autoencoder(config)
    torch.nn.init.zeros_(module.quant_conv.weight)
    torch.nn.init.constant_(module.quant_conv.bias[:4], -5.0)
    _, terms, _ = AutoencoderLoss(module, config)(torch.rand(2, 3, 16, 16), torch.randn(2, 4, 2, 2))
    assert dict(zip(AutoencoderLoss.TERMS, terms.tolist(), strict=True))["outlier"] == pytest.approx(4)
