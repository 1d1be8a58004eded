"""The objective of the autoencoder's training, made to be compiled whole.

Averaged over images x and their reconstructions y from one posterior sample:
    |x - y| + gradient |grad(x - y)| at three scales + log_mse log(mean (x - y)^2)   (the last is -PSNR)
    + energy (excess of |log gradient energy of y over that of x| over 0.05)
    + kl KL(posterior, N(0, 1)) per latent + outlier (excess of |z| over `outlier_sigmas` deviations)^2
The energy term keeps y as sharp as x, where the terms before it prefer soft pictures. The outlier term keeps
the encoder from marking places with huge latents, which no diffusion model reproduces.

Legend: n images, C latent channels, H, W pixels, h, w latent positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from model.autoencoder_config import AutoencoderTrainingConfig
from model.evaluate_autoencoder import gradient_energy

__all__ = ["AutoencoderLoss", "ChannelsLastGroupNorm", "use_channels_last_group_norm"]


class ChannelsLastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` as sums over positions, then over channels.

    In channels-last memory both passes read whole rows, and compiled they fuse with the activation around
    them; torch's own decomposition walks such a tensor channel by channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        n, channels = input.shape[:2]
        x = input.float()
        moments = torch.stack((x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))))  # (2, n, channels)
        mean, square = moments.view(2, n, self.num_groups, -1).mean(dim=3, keepdim=True)  # (n, groups, 1)
        inverse_std = torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        scale = self.weight.view(self.num_groups, -1) * inverse_std  # (n, groups, channels / groups)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        return x * scale.view(n, channels, 1, 1) + shift.view(n, channels, 1, 1)


def use_channels_last_group_norm(module: nn.Module) -> None:
    """Replace each `nn.GroupNorm` in `module` by a `ChannelsLastGroupNorm` of the same parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                norm = ChannelsLastGroupNorm(child.num_groups, child.num_channels, child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)


class AutoencoderLoss(nn.Module):
    """Images (n, 3, H, W) and noise (n, C, h, w) -> loss, its `TERMS` (6,)."""

    TERMS = ("l1", "gradient", "log_mse", "energy", "kl", "outlier")

    def __init__(self, module: AutoencoderKL, config: AutoencoderTrainingConfig) -> None:
        super().__init__()
        if module.quant_conv is None or module.post_quant_conv is None:
            raise ValueError("module: has no quant_conv and post_quant_conv; accepted is one that has both")
        self.module, self.to_moments, self.from_latents = module, module.quant_conv, module.post_quant_conv
        reconstruction = (1.0, config.gradient_weight, config.log_mse_weight, config.energy_weight)
        self.weights = (*reconstruction, config.kl_weight, config.outlier_weight)
        self.outlier_sigmas = config.outlier_sigmas

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            moments = self.to_moments(module.encoder(images)).float()
            mean, log_variance = moments.chunk(2, dim=1)  # (n, C, h, w)
            log_variance = log_variance.clamp(-30, 20)
            z = mean + torch.exp(0.5 * log_variance) * noise
            error = module.decoder(self.from_latents(z)).float() - images
        centre = mean.mean(dim=(0, 2, 3), keepdim=True)
        sigma = (mean - centre).square().mean(dim=(0, 2, 3), keepdim=True).sqrt().detach() + 1e-6
        excess = F.relu((mean - centre.detach()).abs() / sigma - self.outlier_sigmas)
        terms = torch.stack(
            (
                error.abs().mean(),
                _gradient_error(error),
                torch.log(error.square().mean(dim=(1, 2, 3)) + 1e-5).mean(),
                _energy_error(images, images + error),
                0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
                excess.square().mean(),
            )
        )
        return sum(w * term for w, term in zip(self.weights, terms, strict=True)), terms.detach()


def _gradient_error(error: Tensor, num_scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring errors, averaged over scales that halve the resolution."""
    total = error.new_zeros(())
    for scale in range(num_scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return total / num_scales


def _energy_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean over images of how far the logarithm of their gradient energies' ratio leaves -0.05..0.05."""
    pixels = images[0].numel()
    ratio = (gradient_energy(reconstructions) / pixels + 1e-4) / (gradient_energy(images) / pixels + 1e-4)
    return F.relu(torch.log(ratio).abs() - 0.05).mean()
