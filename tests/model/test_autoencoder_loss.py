"""If these fail, the autoencoder is trained for something else than its objective says, or slowly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.autoencoder_config import AutoencoderTrainingConfig, build_autoencoder
from model.autoencoder_loss import (
    AutoencoderLoss,
    ChannelsLastGroupNorm,
    _energy_error,
    use_channels_last_group_norm,
)

TINY = AutoencoderTrainingConfig(
    block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sizes=(16, 32), batch_sizes=(4, 2)
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


def test_energy_error_allows_five_percent_and_no_more() -> None:
    sharp = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    assert _energy_error(sharp, sharp) == 0
    assert _energy_error(sharp, sharp * 0.99) == 0
    assert _energy_error(sharp, sharp * 0.7) > 0.5
    assert _energy_error(sharp, sharp * 1.4) > 0.5
