"""The VAE between pixels and latents: load, encode, decode.

Wraps diffusers' `AutoencoderKL` (Rombach et al. 2022, "High-resolution image synthesis with latent
diffusion models"): images (n, 3, H, W) in [-1, 1], latents (n, C, h, w) with h = H / `downsampling`. The
diffusion model sees scaled latents of about unit variance:
    latents = (z - shift) * scale
with shift and scale from the autoencoder's config: `scaling_factor` and `shift_factor`, or, per channel,
`latents_mean` and `latents_std`. Decoding works in bounded micro-batches, large images in overlapping tiles.

Legend: n images, C latent channels, H, W pixels, h, w latent positions. Training is in autoencoder_training/
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

__all__ = ["Autoencoder", "to_pixels"]

TILE_PIXELS = 512
"""Side of the tiles that a large image is decoded in; neighbours overlap by a quarter and are blended."""


class Autoencoder:
    """A trained `AutoencoderKL` on one device in one dtype, and its scaling of latents."""

    def __init__(self, module: AutoencoderKL, *, micro_batch_pixels: int = 2**20) -> None:
        """Hold `module` (its device, its dtype); a micro-batch has at most `micro_batch_pixels` pixels."""
        if micro_batch_pixels < 1:
            raise ValueError(f"micro_batch_pixels: {micro_batch_pixels} given; accepted is 1 or more")
        self.module = module.eval().requires_grad_(False)
        self.micro_batch_pixels = micro_batch_pixels
        self.device = module.device
        self.dtype = module.dtype
        self.latent_channels = int(module.config["latent_channels"])
        self.downsampling = 2 ** (len(module.config["block_out_channels"]) - 1)
        module.tile_sample_min_size = TILE_PIXELS
        module.tile_latent_min_size = TILE_PIXELS // self.downsampling
        shift, scale = _scaling(module)
        self._shift = shift.to(self.device)[None, :, None, None]  # (1, C, 1, 1), fp32
        self._scale = scale.to(self.device)[None, :, None, None]

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights, 64 hex digits: what a cache of latents depends on."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy())
        return digest.hexdigest()

    @classmethod
    def load(
        cls,
        folder_or_hub_id: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        micro_batch_pixels: int = 2**20,
    ) -> Autoencoder:
        """Read a diffusers `AutoencoderKL` folder, or a hub id's, e.g. `stabilityai/sd-vae-ft-mse`.

        A folder that is missing, damaged or does not fit its own config raises a ValueError of one line.
        """
        source = os.fspath(folder_or_hub_id)
        if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise _load_error(source, "no such folder")
        try:
            module, info = AutoencoderKL.from_pretrained(
                source,
                torch_dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            raise _load_error(source, f"{type(error).__name__}: {error}") from error
        wrong = {kind: names for kind, names in info.items() if names}
        if wrong:
            raise _load_error(source, f"its weights do not fit its config: {wrong}")
        return cls(module.to(device), micro_batch_pixels=micro_batch_pixels)

    @torch.inference_mode()
    def encode_moments(self, images: Tensor) -> Tensor:
        """Posterior mean and log-variance, (n, 2C, h, w) fp32 unscaled, of images (n, 3, H, W) in [-1, 1]."""
        factor = self.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images: shape {tuple(images.shape)} given; "
                f"accepted is (n, 3, H, W), H and W multiples of {factor}"
            )
        module = self.module
        parts = []
        for part in images.split(self._micro_batch(images.shape[2] * images.shape[3])):
            hidden = module.encoder(part.to(self.device, self.dtype))
            parts.append((hidden if module.quant_conv is None else module.quant_conv(hidden)).float())
        return torch.cat(parts)  # (n, 2C, h, w)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (n, C, h, w) fp32 drawn from the posterior whose `moments` are given.

        `noise` is (n, C, h, w) standard normal; without it the posterior's mean is taken.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (z - self._shift) * self._scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) fp32 in [-1, 1] of scaled latents (n, C, h, w)."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents: shape {tuple(latents.shape)} given; accepted is (n, {self.latent_channels}, h, w)"
            )
        z = latents.to(self.device, torch.float32) / self._scale + self._shift
        pixels = z.shape[2] * z.shape[3] * self.downsampling**2
        tiled = pixels > self.micro_batch_pixels
        parts = [self._decode(part, tiled) for part in z.to(self.dtype).split(self._micro_batch(pixels))]
        return torch.cat(parts).clamp(-1, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        """Pixels (n, H, W, 3) uint8 of scaled latents (n, C, h, w), on their device."""
        return to_pixels(self.decode(latents))

    def _decode(self, z: Tensor, tiled: bool) -> Tensor:
        module = self.module
        if tiled:
            return module.tiled_decode(z, return_dict=False)[0].float()
        return module.decoder(z if module.post_quant_conv is None else module.post_quant_conv(z)).float()

    def _micro_batch(self, pixels: int) -> int:
        return max(1, self.micro_batch_pixels // max(1, pixels))


def to_pixels(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] as (n, H, W, 3) uint8 on their device."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(1, -1)


def _scaling(module: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Shift and scale, each (C,) fp32, that the config asks for."""
    config = module.config
    channels = int(config["latent_channels"])
    scale = torch.full((channels,), float(config["scaling_factor"]))
    shift = torch.full((channels,), float(config.get("shift_factor") or 0.0))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"latents_mean, latents_std: {len(mean)} and {len(std)} values given; "
                f"accepted is {channels} each"
            )
        shift, scale = torch.tensor(mean).float(), scale / torch.tensor(std).float()
    return shift, scale


def _load_error(source: str, reason: str) -> ValueError:
    return ValueError(
        f"autoencoder: {source} given; accepted is a folder with an AutoencoderKL's config.json and "
        f"safetensors weights, or a hub id ({' '.join(reason.split())[:300]})"
    )
