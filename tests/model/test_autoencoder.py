"""If these fail, latents change meaning between training and serving, or large images cannot be decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from model.autoencoder import Autoencoder


def tiny_module(**overrides: Any) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=32,
            **overrides,
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_module(scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_load_gives_the_saved_autoencoder(folder: Path) -> None:
    autoencoder = Autoencoder.load(folder)
    module = tiny_module().eval()
    images = noise(2, 3, 32, 40).clamp(-1, 1)
    with torch.no_grad():
        posterior = module.encode(images).latent_dist
        decoded = module.decode(posterior.mean).sample.clamp(-1, 1)
    moments = autoencoder.encode_moments(images)
    torch.testing.assert_close(moments, posterior.parameters)
    latents = autoencoder.latents(moments)
    torch.testing.assert_close(latents, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-5, rtol=0)
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (4, 8)


def test_latents_with_noise_follow_the_posterior() -> None:
    autoencoder = Autoencoder(tiny_module(scaling_factor=2.0))
    mean, log_variance, eps = noise(1, 4, 2, 2), noise(1, 4, 2, 2, seed=2), noise(1, 4, 2, 2, seed=3)
    drawn = autoencoder.latents(torch.cat((mean, log_variance), dim=1), eps)
    torch.testing.assert_close(drawn, 2 * (mean + log_variance.exp().sqrt() * eps))


def test_latents_per_channel_scaling() -> None:
    mean, std = [0.0, 1.0, -1.0, 0.5], [1.0, 2.0, 0.5, 4.0]
    autoencoder = Autoencoder(tiny_module(scaling_factor=1.0, latents_mean=mean, latents_std=std))
    moments = noise(1, 8, 2, 3)
    expected = (moments[:, :4] - torch.tensor(mean)[None, :, None, None]) / torch.tensor(std)[
        None, :, None, None
    ]
    latents = autoencoder.latents(moments)
    torch.testing.assert_close(latents, expected)
    plain = Autoencoder(tiny_module(scaling_factor=1.0))
    torch.testing.assert_close(autoencoder.decode(latents), plain.decode(moments[:, :4]), atol=1e-5, rtol=0)


def test_scaling_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="latents_mean, latents_std: 3 and 3 values given; accepted is 4"):
        Autoencoder(tiny_module(latents_mean=[0.0] * 3, latents_std=[1.0] * 3))


def test_decode_and_encode_in_micro_batches_equal_one_batch() -> None:
    images = noise(5, 3, 32, 32).clamp(-1, 1)
    whole = Autoencoder(tiny_module())
    parts = Autoencoder(tiny_module(), micro_batch_pixels=2 * 32 * 32)
    moments = whole.encode_moments(images)
    torch.testing.assert_close(parts.encode_moments(images), moments, atol=1e-5, rtol=1e-5)
    latents = whole.latents(moments)
    torch.testing.assert_close(parts.decode(latents), whole.decode(latents), atol=1e-5, rtol=0)


def test_decode_large_images_in_tiles() -> None:
    latents = noise(1, 4, 66, 80)  # 528 x 640 pixels: two tiles by two
    whole = Autoencoder(tiny_module()).decode(latents)
    tiled = Autoencoder(tiny_module(), micro_batch_pixels=256 * 256).decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 528, 640)
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.02  # group norms see other surroundings, nothing else differs


def test_decode_bfloat16_returns_float32_images() -> None:
    module = tiny_module()
    latents = noise(1, 4, 4, 4)
    expected = Autoencoder(module).decode(latents)
    images = Autoencoder(tiny_module().to(torch.bfloat16)).decode(latents)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, atol=0.05, rtol=0)  # bf16 holds 8 bits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.encode_moments(torch.zeros(1, 3, 20, 32)), r"images: shape \(1, 3, 20, 32\) given"),
        (lambda a: a.encode_moments(torch.zeros(1, 1, 32, 32)), "accepted is .* multiples of 8"),
        (lambda a: a.decode(torch.zeros(1, 3, 4, 4)), r"latents: shape .* accepted is \(n, 4, h, w\)"),
        (lambda a: Autoencoder(a.module, micro_batch_pixels=0), "micro_batch_pixels: 0 given"),
    ],
    ids=["size", "channels", "latents", "micro-batch"],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Autoencoder(tiny_module()))


def damage_missing(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def damage_no_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def damage_truncated(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_config_syntax(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_other_widths(folder: Path) -> None:
    change_config(folder, block_out_channels=[4, 4, 4, 8])


def damage_more_layers(folder: Path) -> None:
    change_config(folder, layers_per_block=2)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_no_weights,
        damage_truncated,
        damage_config_syntax,
        damage_other_widths,
        damage_more_layers,
    ],
)
def test_load_refuses_bad_folders_in_one_line(folder: Path, damage: Any) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=r"^autoencoder: .* given; accepted is a folder") as caught:
        Autoencoder.load(folder)
    assert "\n" not in str(caught.value)
