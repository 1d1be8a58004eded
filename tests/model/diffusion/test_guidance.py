"""If this fails, the guidance scale means something else than in the authors' code or in DiT's."""

from __future__ import annotations

import pytest
import torch

from model.diffusion import guided_eps

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
