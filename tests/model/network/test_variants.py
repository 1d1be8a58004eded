"""If this fails, an ablation of the paper cannot be built, trained or kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import LaMambaConfig
from model.network.lamamba import LaMambaDiff

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "hidden_size": 8,
    "num_heads": 2,
    "window_size": 4,
    "num_classes": 3,
    "class_dropout_prob": 0.0,
    "depths": (1, 1, 1, 0),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "three-stages": {"depths": (2, 2, 2, 0)},
    "four-stages": {"depths": (1, 1, 1, 1), "bottleneck_depth": 2},
    "ss2d": {"vssm": "ss2d"},
    "vim": {"vssm": "vim"},
    "local-mamba": {"vssm": "local_mamba", "scan_window_size": 2},
    "local-mamba-whole-grid": {"vssm": "local_mamba", "scan_window_size": 8, "num_downsamplings": 1}
    | {"depths": (1, 1, 1), "sample_size": 16},
    "es2d": {"vssm": "es2d", "sample_size": 16},
    "unshifted-windows": {"attention": "window"},
    "global-attention": {"attention": "global"},
    "no-attention": {"attention": "none", "num_heads": 3},
    "smaller-windows": {"window_size": 2},
    "one-downsampling": {"num_downsamplings": 1, "depths": (1, 2, 1)},
    "three-downsamplings": {"num_downsamplings": 3, "depths": (1, 1, 1, 1), "sample_size": 16},
    "three-downsamplings-empty-stage": {"num_downsamplings": 3, "depths": (1, 1, 1, 0), "sample_size": 16},
    "symmetric-decoder": {"decoder_extra_block": False, "depths": (2, 1, 1, 0)},
    "more-blocks": {"depths": (3, 1, 2, 0), "bottleneck_depth": 2},
    "no-middle": {"bottleneck_depth": 0},
    "concatenated-skips": {"skip": "concat"},
    "concatenated-skips-four-stages": {"skip": "concat", "depths": (1, 1, 1, 1)},
    **{
        f"isotropic-patch-{p}": {"layout": "isotropic", "depths": (3,), "bottleneck_depth": 0}
        | {"patch_size": p, "sample_size": 4 * p}
        for p in (1, 2, 4, 8)
    },
    "patch-2": {"patch_size": 2, "sample_size": 16},
    "d-state-4-conv-bias": {"d_state": 4, "conv_bias": True},
    "unconditional": {"num_classes": 0},
    "sixteen-channels": {"in_channels": 16},
    "fixed-variance": {"learn_sigma": False},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variant_trains_a_step_and_survives_a_file(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LaMambaConfig(**SMALL | fields)
    network = LaMambaDiff(**dataclasses.asdict(config))
    for name, parameter in network.named_parameters():
        if ".modulation." in name:  # zero at first: then no gradient passes the gates
            torch.nn.init.normal_(parameter, std=0.3)
    side = config.sample_size
    latents = torch.randn(3, config.in_channels, side, side)
    timestep, labels = (
        torch.tensor([0, 500, 999]),
        torch.tensor([0, min(1, config.num_classes), config.num_classes]),
    )

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    sample = network(latents, timestep, labels).sample
    assert sample.shape == (3, config.out_channels, side, side)
    sample.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    before = sample.detach().square().mean()
    optimizer.step()
    network.eval().requires_grad_(False)
    after = network(latents, timestep, labels).sample
    assert after.square().mean() < before

    network.save_pretrained(tmp_path)
    loaded = LaMambaDiff.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert loaded.architecture == config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in network.state_dict().items())
    torch.testing.assert_close(loaded(latents, timestep, labels).sample.detach(), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vssm", ["ss2d", "local_mamba", "es2d"])
def test_kinds_of_scan_with_equal_weights_are_different_networks(vssm: str) -> None:
    torch.manual_seed(0)
    fields = SMALL | {"scan_window_size": 2}
    continuous, other = LaMambaDiff(**fields).eval(), LaMambaDiff(**fields, vssm=vssm).eval()
    for parameter in continuous.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other.load_state_dict(continuous.state_dict())
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([10])
    with torch.no_grad():
        assert not torch.allclose(
            continuous(latents, timestep).sample, other(latents, timestep).sample, atol=1e-3
        )


def test_global_attention_equals_windows_that_cover_the_grid() -> None:
    torch.manual_seed(0)
    every_token = LaMambaDiff(**SMALL | {"attention": "global"}).eval()
    one_window = LaMambaDiff(**SMALL | {"window_size": 8}).eval()
    for parameter in every_token.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    one_window.load_state_dict(every_token.state_dict())
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([10])
    with torch.no_grad():
        assert torch.equal(every_token(latents, timestep).sample, one_window(latents, timestep).sample)


def test_an_empty_last_stage_still_adds_its_skip() -> None:
    """As in the released code: a three-stage network adds the coarsest skip twice."""
    network = LaMambaDiff(**SMALL | {"depths": (2, 2, 2, 0)})
    assert [len(blocks) for blocks in network.encoder] == [2, 2, 2, 0]
    assert [len(blocks) for blocks in network.decoder] == [0, 3, 3, 3]
    assert len(network.skips) == 4
