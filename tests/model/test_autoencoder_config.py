"""If these fail, a mistyped setting costs a training run instead of one line of error."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from model.autoencoder_config import AutoencoderTrainingConfig, build_autoencoder, parse_settings

TINY = AutoencoderTrainingConfig(
    block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sizes=(16, 32), batch_sizes=(4, 2)
)


def test_default_architecture_is_small_enough_to_ship() -> None:
    module = build_autoencoder(AutoencoderTrainingConfig())
    assert sum(p.numel() for p in module.parameters()) <= 3_300_000
    assert module.config["scaling_factor"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1,)}, r"batch_sizes: \(1,\) given"),
        ({"sizes": (20, 32)}, r"sizes: \(20, 32\) given; accepted are positive multiples of 8"),
        ({"block_out_channels": (4, 6, 8, 8)}, "block_out_channels: .* multiples of norm_num_groups, 4"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 given"),
        ({"max_seconds": 0.0}, "max_seconds: 0.0 given; accepted is more than 0"),
        ({"kl_weight": -1.0}, "kl_weight: -1.0 given; accepted is 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: nan given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_parse_settings() -> None:
    assert parse_settings(["kl_weight=1e-4", "sizes=[128, 256]"]) == {
        "kl_weight": 1e-4,
        "sizes": (128, 256),
    }
    for setting in ("nonsense=1", "seed=abc", "seed", "sizes=128", "kl_weight=[1]"):
        with pytest.raises(ValueError, match=re.escape(f"set: {setting} given")):
            parse_settings([setting])
