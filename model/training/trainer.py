"""The state of a run and its step: noise, network, loss, AdamW, EMA (paper section 4.1, DiT's recipe).

The random numbers of a step are a function of (seed, images seen) alone, so a resumed run continues exactly
without stored generator states. Parameters, EMA and scan state are fp32; the network runs under bf16 autocast
on CUDA. A step whose gradients are not finite changes nothing, the EMA included, and is counted.

On CUDA a whole step, from drawing latents to the EMA, is one CUDA graph, and the blocks are compiled. The
compiler keeps its results in TORCHINDUCTOR_CACHE_DIR: with a folder that lasts, or one copied from another
machine of the same kind, the next run starts several times faster.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.averaged_adamw import AveragedAdamW
from model.cuda_graph import CapturedStep
from model.data.latents import LatentCache
from model.diffusion.loss import LossTables, diffusion_loss, q_sample
from model.diffusion.schedule import NoiseSchedule
from model.network.compiled_blocks import with_compiled_blocks
from model.network.lamamba import LaMambaDiff
from model.training.config import TrainConfig

__all__ = ["Trainer"]

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that seeds and image counts never meet in one generator seed


class Trainer:
    """The state of a run and its step; `load_state_dict` before the first step continues another run."""

    def __init__(self, config: TrainConfig, data: LatentCache, network: LaMambaDiff) -> None:
        self.config, self.data, self.network = config, data, network
        self.device = data.labels.device
        self.images_seen = 0
        self.tables = LossTables.from_schedule(NoiseSchedule.linear(), self.device)
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self._on_cuda = self.device.type == "cuda"
        self.optimizer = AveragedAdamW(
            list(network.parameters()),
            list(self.ema.parameters()),
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            average_decay=config.ema_decay,
            captured=config.cuda_graph and self._on_cuda,
        )
        self._loss = self._compiled_loss()
        self._captured_step: CapturedStep[dict[str, Tensor]] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.images_seen // self.config.batch_size

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the losses and the gradient norm as device scalars, which the next step
        may overwrite.
        """
        if self.config.cuda_graph and self._on_cuda and self._captured_step is None:
            self._captured_step = CapturedStep(self._step, self.optimizer.state())
        torch.manual_seed((self.config.seed * _SEED_STRIDE + self.images_seen) % 2**63)
        self.optimizer.schedule(learning_rate=self._learning_rate(), step=self.step)
        losses = (self._captured_step or self._step)()
        self.images_seen += self.config.batch_size
        return losses

    def _step(self) -> dict[str, Tensor]:
        """What a CUDA graph can hold of a step: all but the host's counting."""
        x0, labels = self.data.sample(self.config.batch_size)
        t = torch.randint(len(self.tables.sqrt_abar), labels.shape, device=self.device)
        loss, mse, vb = self._loss(x0, labels, t, torch.randn_like(x0))
        loss.backward()
        grad_norm = self.optimizer.step()
        return {"loss": loss.detach(), "mse": mse.detach(), "vb": vb.detach(), "grad_norm": grad_norm}

    def _mean_losses(
        self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_t = q_sample(x0, noise, t, self.tables)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._on_cuda):
            output = self.network(x_t, timestep=t, class_labels=labels).sample
        losses = diffusion_loss(output.float(), x0, x_t, noise, t, self.tables)
        return losses.loss.mean(), losses.mse.mean(), losses.vb.mean()

    def _compiled_loss(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        if self.config.compile == "none" or not self._on_cuda:
            return self._mean_losses
        if self.config.compile == "full":
            return torch.compile(self._mean_losses, dynamic=False, fullgraph=True)
        return with_compiled_blocks(self.network, self._mean_losses, dynamic=False)

    def _learning_rate(self) -> float:
        peak, seen = self.config.learning_rate, self.images_seen + self.config.batch_size
        if seen < self.config.warmup_images:
            return peak * seen / self.config.warmup_images
        if self.config.learning_rate_schedule == "constant":
            return peak
        progress = (seen - self.config.warmup_images) / (self.config.num_images - self.config.warmup_images)
        return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "images_seen": self.images_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.images_seen = int(state["images_seen"])
        self._captured_step = None  # it would go on with the old moments
