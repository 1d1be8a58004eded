"""AdamW and the moving average of the weights (EMA), as one update that never asks the host.

Learning rate and decay are tensors on the parameters' device, so a CUDA graph of the update follows their
schedules. A step whose gradients are not all finite leaves parameters, moments and average as they are and is
counted, on the device too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AveragedAdamW"]


class AveragedAdamW:
    """Clips the gradients, updates `parameters`, and moves `average` towards them.

    Attributes:
        skipped: 1 where the last step was skipped, else 0; fp32 scalar on the device.
        skipped_steps: the sum of `skipped`; fp32 scalar on the device.
        skipped_in_a_row: steps skipped since the last that was not; fp32 scalar on the device.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        average: Sequence[Tensor],
        *,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        max_grad_norm: float,
        average_decay: float,
        captured: bool,
        sum_over_shards: Callable[[Tensor], None] | None = None,
    ) -> None:
        """`average_decay` is reached from below as (1 + step) / (10 + step), which forgets the first weights.

        `captured`: the update will run inside a CUDA graph. `sum_over_shards`: where `parameters` are shards,
        sums a scalar over the processes that hold the others, in place.
        """
        self.parameters, self.average = list(parameters), list(average)
        self.max_grad_norm, self.average_decay = max_grad_norm, average_decay
        self._sum_over_shards = sum_over_shards
        # What the parameter groups must hold, also after moments of another run were loaded.
        self._settings = {"betas": betas, "weight_decay": weight_decay, "capturable": captured}
        device = self.parameters[0].device
        self.skipped = torch.ones((), device=device)
        self.skipped_steps, self.skipped_in_a_row = (torch.zeros((), device=device) for _ in range(2))
        self._learning_rate, self._average_weight = (torch.zeros((), device=device) for _ in range(2))
        self._adamw = torch.optim.AdamW(
            self.parameters, lr=self._learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        # What GradScaler sets for the same purpose: a fused step changes nothing where `found_inf` is 1, and
        # divides gradients by `grad_scale` as it reads them. So clipping is no pass of its own; but the step
        # writes the quotients back, so it is not asked to divide where nothing can clip.
        self._adamw.found_inf = self.skipped  # type: ignore[attr-defined]
        self._clipping = torch.ones((), device=device) if math.isfinite(max_grad_norm) else None
        self._adamw.grad_scale = self._clipping  # type: ignore[attr-defined]
        # average += weight * (parameter - average) is a step of gradient descent along `-parameter`, with
        # decay 1 and the weight for a learning rate. It passes over memory once, where torch._foreach_lerp_
        # wants a weight that the host knows.
        for mean, parameter in zip(self.average, self.parameters, strict=True):
            mean.grad = parameter.detach()
        self._averaging = torch.optim.SGD(
            self.average, lr=self._average_weight, weight_decay=1.0, maximize=True, fused=True
        )
        self._averaging.found_inf = self.skipped  # type: ignore[attr-defined]
        self._create_moments()
        self._use_own_settings()

    def schedule(self, *, learning_rate: float, step: int) -> None:
        """Set what the next update uses; `step` counts the updates before it."""
        decay = min(self.average_decay, (1 + step) / (10 + step))
        self._learning_rate.fill_(learning_rate)
        self._average_weight.fill_(1 - decay)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Apply the parameters' gradients, then free them; returns their norm before clipping."""
        grad_norm = self._grad_norm()
        if self._clipping is not None:
            self._clipping.copy_((grad_norm / self.max_grad_norm).clamp(min=1))
        self.skipped.copy_(~torch.isfinite(grad_norm))
        self.skipped_steps += self.skipped
        self.skipped_in_a_row.add_(1).mul_(self.skipped)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._averaging.step()
        return grad_norm

    def state(self) -> list[Tensor]:
        """Every tensor that an update changes in place and a later one reads."""
        moments = [value for parameter in self.parameters for value in self._adamw.state[parameter].values()]
        counts = [self.skipped, self.skipped_steps, self.skipped_in_a_row]
        return [*self.parameters, *self.average, *moments, *counts]

    def moments(self, name: str) -> list[Tensor]:
        """Of each parameter, AdamW's own tensor called `name`: `exp_avg`, `exp_avg_sq` or `step`."""
        return [self._adamw.state[parameter][name] for parameter in self.parameters]

    def state_dict(self) -> dict[str, Any]:
        """The moments, as torch.optim.AdamW keeps them, and `skipped_steps`; the parameters and their average
        have other homes.
        """
        return {**self._adamw.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the moments and the count of `state`, and none of its settings.

        The moments are new tensors, so a graph that was captured before is void.
        """
        self._adamw.load_state_dict(state)
        self.skipped_steps.copy_(state["skipped_steps"])
        self._use_own_settings()

    def _grad_norm(self) -> Tensor:
        """Of all gradients as one vector, those of other shards included."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._sum_over_shards is None:
            return norm
        square = norm.square()
        self._sum_over_shards(square)
        return square.sqrt()

    def _create_moments(self) -> None:
        """AdamW makes its moments at its first step: here one that is skipped, so that all state exists."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def _use_own_settings(self) -> None:
        for group in self._adamw.param_groups:
            group.update(self._settings, lr=self._learning_rate)
        # The steps before the capture run uncaptured on purpose.
        self._adamw._warned_capturable_if_run_uncaptured = True
