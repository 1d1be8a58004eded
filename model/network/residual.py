"""Residual branches and the norm that each begins with: AdaLN (DiT, Peebles & Xie 2023).

    x = x + gate * branch(modulate(LN(x), shift, scale))

The sum of one branch and the norm of the next read and write the same numbers. So that one kernel can do both
in one pass, a branch's result travels beside x as a `Residual` until something needs the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.network import fused_norms


class Residual(NamedTuple):
    """`x + gate * branch`, still to be added: `(B, H, W, d)`, the same, and `(B, d)`; or x alone."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def sum(self, *, use_kernels: bool = False) -> Tensor:
        """`use_kernels`: as the network's modules have it."""
        if self.branch is None or self.gate is None:
            return self.x
        gate = self.gate[:, None, None]
        if not torch.is_grad_enabled():
            return torch.addcmul(self.x, gate, self.branch)  # one launch, and nothing but the sum is stored
        if use_kernels:
            return fused_norms.residual_sum(self.x, self.branch, self.gate)
        return self.x + gate * self.branch


class ResidualNorm(nn.LayerNorm):
    """A residual and AdaLN's shift and scale `(B, d)` to its sum and `LN(sum) * (1 + scale) + shift`.

    `use_kernels` is set by whoever loads the network (`LaMambaDiff.use_scan_backend`).
    """

    use_kernels: bool = False

    def forward(  # type: ignore[override]  # a norm with more to it
        self, residual: Residual, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        if fused_norms.norms_run(self.use_kernels):
            return fused_norms.residual_norm(*residual, self.weight, self.bias, shift, scale, self.eps)
        x = residual.sum()
        return x, super().forward(x) * (1 + scale[:, None, None]) + shift[:, None, None]
