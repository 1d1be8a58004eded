"""If these fail, a mistyped setting costs a training run instead of one line of error."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.autoencoder_training.config import AutoencoderTrainingConfig, build_autoencoder, parse_settings

TINY = AutoencoderTrainingConfig(
    block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sizes=(16, 32), crop=16, batch_size=4
)


def test_default_architecture_is_small_enough_to_ship() -> None:
    module = build_autoencoder(AutoencoderTrainingConfig())
    assert sum(p.numel() for p in module.parameters()) <= 3_300_000
    assert module.config["scaling_factor"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch_size: 5 given; accepted are positive multiples of 2, the number of sizes"),
        ({"crop": 32}, r"sizes: \(16, 32\) given; accepted are sizes of at least crop, 32"),
        ({"crop": 12}, "crop: 12 given; accepted are positive multiples of 8"),
        ({"adversarial_ratio": -1.0}, "adversarial_ratio: -1.0 given"),
        ({"train_encoder": False}, "train_encoder: False given without initial_weights"),
        ({"sizes": (20, 32)}, "sizes: 20 given; accepted are positive multiples of 8"),
        ({"block_out_channels": (4, 6, 8, 8)}, "block_out_channels: .* multiples of norm_num_groups, 4"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 given"),
        ({"max_seconds": 0.0}, "max_seconds: 0.0 given; accepted is more than 0"),
        ({"max_images": -1}, "max_images: -1 given; an integer of at least 1 is accepted"),
        ({"evaluation_views": 0}, "evaluation_views: 0 given; an integer of at least 1 is accepted"),
        ({"latent_noise": -0.1}, "latent_noise: -0.1 given; accepted is 0 or more"),
        ({"kl_weight": -1.0}, "kl_weight: -1.0 given; accepted is 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: nan given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_initial_weights_are_those_of_the_folder_with_the_posterior_of_the_config(tmp_path: Path) -> None:
    saved = build_autoencoder(replace(TINY, seed=1))
    torch.nn.init.constant_(saved.quant_conv.bias[4:], 1.0)
    saved.half().save_pretrained(tmp_path)
    module = build_autoencoder(replace(TINY, initial_weights=str(tmp_path)))
    assert module.dtype == torch.float32
    images = torch.rand(2, 3, 16, 16)
    ours, theirs = module.encode(images).latent_dist, saved.float().encode(images).latent_dist
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(module.decode(ours.mean).sample, saved.decode(ours.mean).sample)
    torch.testing.assert_close(ours.std, torch.full_like(ours.std, 0.01))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (4, 4, 8, 12)}, r"block_out_channels \[4, 4, 8, 12\]"),
        ({"norm_num_groups": 2}, "norm_num_groups 2"),
    ],
    ids=["width", "groups"],
)
def test_initial_weights_refuse_another_architecture(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    build_autoencoder(replace(TINY, **changes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"initial_weights: .* with {message} given; accepted is"):
        build_autoencoder(replace(TINY, initial_weights=str(tmp_path)))


def test_initial_weights_refuse_latents_that_need_scaling(tmp_path: Path) -> None:
    module = build_autoencoder(TINY)
    module.register_to_config(scaling_factor=0.18215)
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scaling_factor 0.18215 given; .* latents that need no scaling"):
        build_autoencoder(replace(TINY, initial_weights=str(tmp_path)))


def test_parse_settings() -> None:
    assert parse_settings(["kl_weight=1e-4", "sizes=[128, 256]", "initial_weights=runs/1/vae"]) == {
        "kl_weight": 1e-4,
        "sizes": (128, 256),
        "initial_weights": "runs/1/vae",
    }
    with pytest.raises(ValueError, match=r"batchsize: unknown field of .*; did you mean batch_size"):
        parse_settings(["batchsize=1"])
    for setting in ("seed=abc", "seed", "sizes=128", "kl_weight=[1]"):
        with pytest.raises(ValueError, match=re.escape(f"set: {setting} given")):
            parse_settings([setting])


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "batch_size=null",
            "seed=null",
            "seed=1e30",
            "seed=-1",
            "warmup_steps=1.5",
            "layers_per_block=true",
        ),
        *("max_grad_norm=null", "learning_rate=true", "learning_rate=Infinity", "kl_weight=NaN"),
        *("checkpoint_seconds=null", "block_out_channels=[]", 'block_out_channels=[32,"x"]', 'sizes=["a"]'),
        *("train_encoder=5", "compile=1", "initial_weights=5"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_field(setting: str) -> None:
    with pytest.raises(ValueError, match=f"^{setting.partition('=')[0]}: .* accepted"):
        AutoencoderTrainingConfig(**parse_settings([setting]))
