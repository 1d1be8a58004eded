"""One denoising step of a batch of images, each at its own place in its own sampler.

    rows (one network evaluation each) = all images, conditional + the guided ones again, with the null label
    network -> guidance -> sampler update

With a guidance network (autoguidance, arXiv 2406.02507) the guided images go through that one instead, with
their own labels: a worse network, smaller or trained for less time, whose errors guidance steps away from.

The in-process pipeline and the server both call `denoise_step`. It is a pure function of tensors, with no
host synchronisation and a number of rows that only the shapes of its inputs decide, so it can be compiled
or captured in a CUDA graph; which images are in the batch is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.diffusion.guidance import guided_eps
from model.diffusion.samplers import sampler_step

__all__ = ["DenoisingNetwork", "StepBatch", "denoise_step"]


class DenoisingOutput(Protocol):
    @property
    def sample(self) -> Tensor:
        """(rows, C or 2C, H, W): eps, then the variance logits if they are learned."""


class DenoisingNetwork(Protocol):
    """What `denoise_step` needs of a network; LaMambaDiff and diffusers' transformers have it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it takes latents in."""

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> DenoisingOutput: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """The state of the images in a step and what each of them does in it; all tensors on one device."""

    latents: Tensor
    """(images, C, H, W) fp32."""
    history: Tensor
    """(images, C, H, W) fp32: what the image's step before returned; not read at its first step."""
    timesteps: Tensor
    """(images,): the step number shown to the network, `SamplerTable.timesteps` at the image's step."""
    coefficients: Tensor
    """(images, 8) fp32: `SamplerTable.coefficients` at the image's step."""
    class_labels: Tensor
    """(images,) int64."""
    guidance_scale: Tensor
    """(images,) fp32; 1 = off. Read for the guided images alone."""
    guided: Tensor
    """(guided images,) int64: indices of the images whose scale is not 1. One may be repeated as padding."""
    noise: Tensor | None
    """(images, C, H, W) fp32 standard normal; None if no image of the batch is at a stochastic step."""

    @classmethod
    def blank(
        cls, num_images: int, latent_shape: tuple[int, int, int], *, num_guided: int, device: torch.device
    ) -> StepBatch:
        """A valid batch of images of class 0, the first `num_guided` guided, whose numbers mean nothing."""
        images = torch.zeros(3, num_images, *latent_shape, device=device)
        numbers = torch.zeros(2, num_images, dtype=torch.int64, device=device)
        return cls(
            latents=images[0],
            history=images[1],
            timesteps=numbers[0],
            coefficients=torch.zeros(num_images, 8, device=device),
            class_labels=numbers[1],
            guidance_scale=torch.ones(num_images, device=device),
            guided=torch.arange(num_guided, device=device),
            noise=images[2],
        )


def denoise_step(
    network: DenoisingNetwork,
    batch: StepBatch,
    *,
    null_label: int,
    guidance_channels: int | None = None,
    guidance_network: DenoisingNetwork | None = None,
) -> tuple[Tensor, Tensor]:
    """Move every image one step; returns its next latents and history, (images, C, H, W) fp32 each.

    One network call on images + guided images rows, in the network's dtype; all else is fp32. With a guidance
    network it is one of each, on the images and on the guided images. The variance logits are those of the
    conditional row, as in the authors' code.

    Args:
        null_label: the class label that stands for no class.
        guidance_channels: how many of the first latent channels are guided; None is all of them.
        guidance_network: what guidance steps away from; None is `network` without a class.
    """
    num_images, channels = batch.latents.shape[:2]
    rows, timesteps, class_labels = batch.latents, batch.timesteps, batch.class_labels
    has_guidance = batch.guided.shape[0] > 0
    if has_guidance and guidance_network is None:
        rows = torch.cat([rows, rows[batch.guided]])
        timesteps = torch.cat([timesteps, timesteps[batch.guided]])
        class_labels = torch.cat([class_labels, torch.full_like(batch.guided, null_label)])

    output = network(rows.to(network.dtype), timestep=timesteps, class_labels=class_labels).sample.float()
    conditional, others = output[:num_images], output[num_images:]
    if has_guidance and guidance_network is not None:
        others = guidance_network(
            rows[batch.guided].to(guidance_network.dtype),
            timestep=timesteps[batch.guided],
            class_labels=class_labels[batch.guided],
        ).sample.float()
    eps = conditional[:, :channels]
    variance_logits = conditional[:, channels:] if output.shape[1] == 2 * channels else None

    if has_guidance:
        scale = batch.guidance_scale[batch.guided]
        guided = guided_eps(eps[batch.guided], others[:, :channels], scale, guidance_channels)
        eps = eps.index_copy(0, batch.guided, guided)
    return sampler_step(batch.latents, eps, variance_logits, batch.history, batch.noise, batch.coefficients)
