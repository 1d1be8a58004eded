"""Judge a trained autoencoder on views of places, and make its latents unit-variance.

- PSNR, mean over images of 10 log10(4 / MSE) dB for pixels in [-1, 1], and the gradient energy of the
  reconstructions over that of the originals (below 1: soft, above 1: noisy or ringing): the mean of the
  images' ratios, and the ratio of the sums, which a few images full of speckles decide. All of posterior
  means and clamped pixels, what a user sees.
- Point response: how far the picture changes around a latent that is a little wrong. A decoder that
  exaggerates it draws dots where a diffusion model errs.
- Latent statistics by channel: how far from normal the diffusion model's data is.
- `normalise_latents` folds each channel's mean and standard deviation into the two 1x1 convolutions beside
  the latents. The autoencoder stays the same function of pixels with `scaling_factor` 1, so that every
  pipeline that knows that one number alone (diffusers' DiTPipeline among them) sees normalised latents.

Legend: n images, C latent channels, h, w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from model.autoencoder import Autoencoder, to_pixels
from model.data.places import RESERVED_VIEW_IDS, Places

__all__ = [
    "gradient_energy",
    "latent_statistics",
    "normalise_latents",
    "peak_signal_to_noise",
    "point_response",
    "reconstruction_metrics",
    "reconstruction_picture",
]

_BATCH = 64


def peak_signal_to_noise(images: Tensor, reconstructions: Tensor) -> Tensor:
    """PSNR in dB of each image, (n,), for pixels in [-1, 1]."""
    return 10 * torch.log10(4 / (images - reconstructions).square().mean(dim=(1, 2, 3)).clamp_min(1e-12))


def gradient_energy(images: Tensor) -> Tensor:
    """Sum of squared differences of neighbouring pixels of each image, (n,)."""
    across = images.diff(dim=3).square().sum(dim=(1, 2, 3))
    return across + images.diff(dim=2).square().sum(dim=(1, 2, 3))


def reconstruction_metrics(
    autoencoder: Autoencoder, places: Places, *, size: int, num_views: int
) -> dict[str, float]:
    """`psnr` in dB and `gradient_energy_ratio` (means over images), `gradient_energy_ratio_of_sums`.

    Of the first `num_views` reserved views, decoded from posterior means.
    """
    psnr, original_energy, energy = [], [], []
    for images in _view_batches(places, RESERVED_VIEW_IDS, num_views, size):
        reconstructions = autoencoder.decode(autoencoder.latents(autoencoder.encode_moments(images)))
        psnr.append(peak_signal_to_noise(images, reconstructions))
        original_energy.append(gradient_energy(images))
        energy.append(gradient_energy(reconstructions))
    return {
        "psnr": torch.cat(psnr).mean().item(),
        "gradient_energy_ratio": (torch.cat(energy) / torch.cat(original_energy)).mean().item(),
        "gradient_energy_ratio_of_sums": (torch.cat(energy).sum() / torch.cat(original_energy).sum()).item(),
    }


def point_response(autoencoder: Autoencoder, places: Places, *, size: int, num_views: int) -> list[float]:
    """Of each channel, the root mean square change of pixels when one latent is 1 larger.

    Averaged over the central latents of the first reserved views; the squared change of the whole picture is
    divided by the values that one latent stands for, as if it stayed there.
    """
    totals = torch.zeros(autoencoder.latent_channels, device=autoencoder.device)
    for images in _view_batches(places, RESERVED_VIEW_IDS, num_views, size):
        latents = autoencoder.latents(autoencoder.encode_moments(images))  # (n, C, h, w)
        before = autoencoder.decode(latents)
        for channel in range(autoencoder.latent_channels):
            changed = latents.clone()
            changed[:, channel, latents.shape[2] // 2, latents.shape[3] // 2] += 1
            totals[channel] += (autoencoder.decode(changed) - before).square().sum()
    values = num_views * before.shape[1] * autoencoder.downsampling**2
    return (totals / values).sqrt().tolist()


def latent_statistics(
    autoencoder: Autoencoder, places: Places, *, sizes: Sequence[int], num_views: int
) -> dict[str, Any]:
    """Per-channel moments of posterior means over `num_views` training views, equally many of each size.

    `mean` and `std` (C each) weigh the sizes equally. `by_size` has, for each size, `std`, `kurtosis` (3 for
    a normal distribution), `max_sigmas` (largest distance from the mean in standard deviations) and
    `posterior_std` (root mean square width of the posterior). All are of latents as the autoencoder scales
    them.
    """
    means, squares, by_size = [], [], {}
    for size in sizes:
        latents, variances = [], []
        for images in _view_batches(places, 0, -(-num_views // len(sizes)), size):
            moments = autoencoder.encode_moments(images)
            latents.append(autoencoder.latents(moments))
            one_above = autoencoder.latents(moments, torch.ones_like(latents[-1]))
            variances.append((one_above - latents[-1]).square().mean(dim=(0, 2, 3)))
        z = torch.cat(latents).movedim(1, 0).flatten(1).double()  # (C, n h w)
        centred = z - z.mean(dim=1, keepdim=True)
        std = centred.square().mean(dim=1).sqrt()
        means.append(z.mean(dim=1))
        squares.append(z.square().mean(dim=1))
        by_size[str(size)] = {
            "std": std.tolist(),
            "kurtosis": (centred.pow(4).mean(dim=1) / std.pow(4)).tolist(),
            "max_sigmas": (centred.abs().amax(dim=1) / std).tolist(),
            "posterior_std": torch.stack(variances).mean(dim=0).sqrt().tolist(),
        }
    mean = torch.stack(means).mean(dim=0)
    std = (torch.stack(squares).mean(dim=0) - mean.square()).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist(), "by_size": by_size}


@torch.no_grad()
def normalise_latents(module: AutoencoderKL, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Change `module` in place so that its latents become (z - mean) / std, channel by channel, images equal.

    Reconstructions stay what they were, up to rounding; its config must ask for no scaling of its own.
    """
    before, after = module.quant_conv, module.post_quant_conv
    if before is None or after is None or before.bias is None or after.bias is None:
        raise ValueError("module: has no quant_conv and post_quant_conv; accepted is one that has both")
    shift = torch.tensor(mean, device=module.device, dtype=torch.float32)  # (C,)
    scale = torch.tensor(std, device=module.device, dtype=torch.float32)
    # Outputs of quant_conv: C means, then C log-variances.
    before.weight.div_(torch.cat((scale, torch.ones_like(scale)))[:, None, None, None])
    before.bias.copy_(
        torch.cat(((before.bias[: len(mean)] - shift) / scale, before.bias[len(mean) :] - 2 * scale.log()))
    )
    after.bias.add_(after.weight[:, :, 0, 0] @ shift)
    after.weight.mul_(scale[None, :, None, None])


def reconstruction_picture(
    autoencoder: Autoencoder, places: Places, *, sizes: Sequence[int], columns: int = 8
) -> NDArray[np.uint8]:
    """For each size a row of reserved views above a row of their reconstructions, (H, W, 3) uint8.

    Smaller sizes are enlarged by whole factors, without interpolation.
    """
    rows = []
    for size in sizes:
        (images,) = _view_batches(places, RESERVED_VIEW_IDS, columns, size)
        reconstructions = autoencoder.decode(autoencoder.latents(autoencoder.encode_moments(images)))
        zoom = max(1, max(sizes) // size)
        for row in (images, reconstructions):
            pixels = to_pixels(row).cpu()  # (n, S, S, 3)
            enlarged = pixels.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
            canvas = torch.zeros(columns, size * zoom, max(sizes), 3, dtype=torch.uint8)
            canvas[:, :, : size * zoom] = enlarged
            rows.append(torch.cat(tuple(canvas), dim=1))
    return torch.cat(rows).numpy()


def _view_batches(places: Places, first_id: int, num_views: int, size: int) -> Iterator[Tensor]:
    for start in range(0, num_views, _BATCH):
        ids = first_id + torch.arange(start, min(start + _BATCH, num_views), device=places.device)
        yield places.render(ids, size)[0]
