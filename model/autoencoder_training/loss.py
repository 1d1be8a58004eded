"""The objective of the autoencoder's training but for its perceptual terms, made to be compiled whole.

Averaged over images x and their reconstructions y:
    |x - y| + gradient |grad(x - y)| at three scales + log_mse log(mean (x - y)^2)   (the last is -PSNR)
    + energy (difference of the root mean square gradients of x and y in cells, relative to those of x)
    + kl KL(N(mean_c, std_c^2), N(0, 1)) of the channels' distributions over the batch
    + outlier (excess of |z| over `outlier_sigmas`)^2
The energy term keeps y as sharp as x, where the terms before it prefer soft pictures; what the sharpness
shows is left to perceptual_loss.py. It works cell by cell and within what can be shown: energy is a square,
so that over a whole picture a few specks far beyond white would make up for softness everywhere, at little
cost to |x - y|.

y is decoded from z + level * e: z the posterior's mean, level from 0 for a batch's first image to
`latent_noise` for its last, e = noise^3 / sqrt(15) of unit variance, mostly small and rarely large. This
takes the place of a learned posterior, whose width may outgrow a channel's signal. The level is absolute and
the kl term holds the channels' deviations at 1, so that no channel fades. The rare large errors are those of
a diffusion model: they teach the decoder to answer gently to a latent that its neighbours contradict, which
it would draw as a dot. The outlier term keeps the encoder from marking places with huge latents, which no
diffusion model reproduces.

Legend: n images, C latent channels, H, W pixels, h, w latent positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from model.autoencoder_training.config import AutoencoderTrainingConfig

__all__ = ["AutoencoderLoss", "ChannelsLastGroupNorm", "use_channels_last_group_norm"]

_CUBE_STD = math.sqrt(15)  # of the cube of a standard normal variable


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
    """Images (n, 3, H, W) and standard normal noise (n, C, h, w) -> loss, its `TERMS` (6,), and what
    perceptual terms judge: the reconstructions (n, 3, H, W), clamped to [-1, 1].
    """

    TERMS = ("l1", "gradient", "log_mse", "energy", "kl", "outlier")

    def __init__(self, module: AutoencoderKL, config: AutoencoderTrainingConfig) -> None:
        super().__init__()
        if module.quant_conv is None or module.post_quant_conv is None:
            raise ValueError("module: has no quant_conv and post_quant_conv; accepted is one that has both")
        self.module, self.to_moments, self.from_latents = module, module.quant_conv, module.post_quant_conv
        reconstruction = (1.0, config.gradient_weight, config.log_mse_weight, config.energy_weight)
        self.weights = (*reconstruction, config.kl_weight, config.outlier_weight)
        self.latent_noise, self.outlier_sigmas = config.latent_noise, config.outlier_sigmas
        self.train_encoder = config.train_encoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        level = torch.linspace(0, self.latent_noise, images.shape[0], device=images.device)  # (n,)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            with torch.set_grad_enabled(self.train_encoder):
                z = self.to_moments(module.encoder(images)).float().chunk(2, dim=1)[0]  # (n, C, h, w)
            noisy = z + level[:, None, None, None] * noise.pow(3) / _CUBE_STD
            reconstructions = module.decoder(self.from_latents(noisy)).float()
        error, shown = reconstructions - images, reconstructions.clamp(-1, 1)
        terms = torch.stack(
            (
                error.abs().mean(),
                _gradient_error(error),
                torch.log(error.square().mean(dim=(1, 2, 3)) + 1e-5).mean(),
                _energy_error(images, shown),
                _channel_divergence(z),
                F.relu(z.abs() - self.outlier_sigmas).square().mean(),
            )
        )
        loss = sum(w * term for w, term in zip(self.weights, terms, strict=True))
        return loss, terms.detach(), shown


def _gradient_error(error: Tensor, num_scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring errors, averaged over scales that halve the resolution."""
    total = error.new_zeros(())
    for scale in range(num_scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return total / num_scales


def _energy_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean over images of sum |s - r| / sum r over cells: r, s are the cells' root mean square gradients.

    Reconstructions must be as they will be seen, clamped: beyond white there is energy that costs nothing.
    """
    before, after = _cell_gradients(images), _cell_gradients(reconstructions)
    return ((after - before).abs().sum(dim=(1, 2, 3)) / before.sum(dim=(1, 2, 3))).mean()


def _cell_gradients(images: Tensor, cell: int = 8) -> Tensor:
    """Root mean square gradient over colours in each cell of 8 by 8 pixels, (n, 1, H / 8, W / 8)."""
    across = F.pad(images.diff(dim=3).square(), (0, 1, 0, 0))
    down = F.pad(images.diff(dim=2).square(), (0, 0, 0, 1))
    return (F.avg_pool2d((across + down).mean(dim=1, keepdim=True), cell) + 1e-5).sqrt()


def _channel_divergence(z: Tensor) -> Tensor:
    """Mean over channels of KL(N(mean_c, std_c^2), N(0, 1)), their moments over the batch; z (n, C, h, w)."""
    mean = z.mean(dim=(0, 2, 3))  # (C,)
    variance = (z - mean[:, None, None]).square().mean(dim=(0, 2, 3)) + 1e-6
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()
