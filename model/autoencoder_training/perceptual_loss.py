"""What makes reconstructions look right: distances of features, and a discriminator on the same features.

Features are those of EfficientNet-Lite0 at five strides, of images enlarged twofold (its own size is near).
- `feature_distance`: squared distance of unit-length features, as LPIPS without learned weights (Zhang et al.
  2018, "The unreasonable effectiveness of deep features as a perceptual metric").
- `FeatureDiscriminator`: small convolutional heads tell real from decoded features, patch by patch, as
  projected GANs do (Sauer et al. 2021, "Projected GANs converge faster"), with hinge losses. It asks for the
  texture that the latents left out, which no distance to the original can: its best answer is an average.
- The two are balanced by their gradients (Defossez et al. 2022, "High fidelity neural audio compression"):
  the adversarial one always has `adversarial_ratio` times the norm of the other. With a fixed weight on its
  value a decoder that once deceived the discriminator left the originals altogether, for ever larger logits.

Legend: n images, H, W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.efficientnet_lite import FeatureStages

__all__ = ["FeatureDiscriminator", "PerceptualLoss", "feature_distance"]

_HEAD_WIDTH = 64


class FeatureDiscriminator(nn.Module):
    """Features of `FeatureStages` -> logits (n, 1, h, w) at all but the first stage, high for real images."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(width) for width in FeatureStages.WIDTHS[1:])

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        return [head(_unit_scale(x)) for head, x in zip(self.heads, stages[1:], strict=True)]


class PerceptualLoss(nn.Module):
    """Images and reconstructions (n, 3, H, W) in [-1, 1] -> loss, its `TERMS` (3,).

    The loss is made for its gradients: with respect to the reconstructions the balanced sum of
    `perceptual_weight * perceptual` and `adversarial`, with respect to the discriminator's parameters that of
    `discriminator`. One backward pass trains both sides.
    """

    TERMS = ("perceptual", "adversarial", "discriminator")

    def __init__(self, *, perceptual_weight: float, adversarial_ratio: float) -> None:
        super().__init__()
        self.perceptual_weight, self.adversarial_ratio = perceptual_weight, adversarial_ratio
        self.features = FeatureStages()
        self.discriminator = FeatureDiscriminator()

    def forward(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        shown = reconstructions.detach().requires_grad_()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            with torch.no_grad():
                real = self.features(_enlarged(images))
            decoded = self.features(_enlarged(shown))
            deceived = self.discriminator(decoded)
            judged_real = self.discriminator(real)
            judged_decoded = self.discriminator([stage.detach() for stage in decoded])
        perceptual, adversarial = feature_distance(real, decoded), -_mean_of_stages(deceived)
        discriminator = _mean_of_stages([F.relu(1 - x) for x in judged_real])
        discriminator = discriminator + _mean_of_stages([F.relu(1 + x) for x in judged_decoded])

        (to_original,) = torch.autograd.grad(self.perceptual_weight * perceptual, shown, retain_graph=True)
        (to_real,) = torch.autograd.grad(adversarial, shown)
        balance = self.adversarial_ratio * to_original.norm() / to_real.norm().clamp_min(1e-12)
        loss = (reconstructions * (to_original + balance * to_real)).sum() + discriminator
        return loss, torch.stack((perceptual, adversarial, discriminator)).detach()


def feature_distance(real: list[Tensor], decoded: list[Tensor]) -> Tensor:
    """Mean over stages and positions of the squared distance between unit vectors of channels: 0 to 4."""
    distances = [
        (_unit_length(x) - _unit_length(y)).square().sum(dim=1).mean()
        for x, y in zip(real, decoded, strict=True)
    ]
    return torch.stack(distances).mean()


def _head(width: int) -> nn.Sequential:
    hidden = _HEAD_WIDTH
    return nn.Sequential(
        nn.Conv2d(width, hidden, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(hidden, 1, 1),
    )


def _enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


def _unit_length(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-6)


def _unit_scale(x: Tensor) -> Tensor:
    """Each image's features over their root mean square, which stages and pictures differ in widely."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6)


def _mean_of_stages(stages: list[Tensor]) -> Tensor:
    return torch.stack([x.float().mean() for x in stages]).mean()
