"""The visual state space module (paper section 3.1): SS2D of VMamba on continuous paths, and its
alternatives.

    u, z = in_proj(x);  u = SiLU(conv3x3(u));  y = sum over directions of scan(u);  out_proj(LN(y) * SiLU(z))

All kinds (config field `vssm`) share this shell and differ in the paths alone, which the grid's geometry
holds. The projections of a token do not depend on the order of the tokens, so they run once, for all
directions, on the unpermuted grid; only the recurrence follows a path. Scan arithmetic is fp32 whatever the
projections use.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import dt_rank
from model.network import depthwise_conv, fused_norms
from model.network.geometry import GridGeometry
from model.network.scan import ScanBackend

EXPAND = 2
_DT_MIN, _DT_MAX = 1e-3, 0.1


class VisualStateSpace(nn.Module):
    """SS2D and its alternatives, `(B, H, W, d) -> (B, H, W, d)`.

    `scan_backend` and `use_kernels` are set by whoever loads the network (`LaMambaDiff.use_scan_backend`).
    """

    def __init__(
        self, width: int, *, d_state: int, num_directions: int, conv_bias: bool, scan_backend: ScanBackend
    ) -> None:
        super().__init__()
        self.scan_backend = scan_backend
        self.use_kernels = scan_backend.kernels
        d_inner, rank = EXPAND * width, dt_rank(width)
        self.splits = (rank, d_state, d_state)
        self.in_proj = nn.Linear(width, 2 * d_inner, bias=False)
        self.conv = nn.Conv2d(d_inner, d_inner, kernel_size=3, padding=1, groups=d_inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(num_directions, sum(self.splits), d_inner))
        self.dt_proj_weight = nn.Parameter(torch.empty(num_directions, d_inner, rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(num_directions, d_inner))
        self.A_log = nn.Parameter(torch.empty(num_directions, d_inner, d_state))
        self.D = nn.Parameter(torch.empty(num_directions, d_inner))
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, width, bias=False)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The released code's initial values of everything that is not a linear layer."""
        num_directions, d_inner, rank = self.dt_proj_weight.shape
        self.conv.reset_parameters()
        self.x_proj_weight.uniform_(-(d_inner**-0.5), d_inner**-0.5)
        self.dt_proj_weight.uniform_(-(rank**-0.5), rank**-0.5)
        dt = torch.exp(
            torch.rand(num_directions, d_inner) * (math.log(_DT_MAX) - math.log(_DT_MIN)) + math.log(_DT_MIN)
        )
        self.dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1.0, self.A_log.shape[-1] + 1).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, x: Tensor, geometry: GridGeometry) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, H, W, d_inner) each
        if self.use_kernels:
            u = depthwise_conv.conv3x3_silu(u, self.conv.weight, self.conv.bias)
        else:
            u = F.silu(self.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = self._scan(u.flatten(1, 2), geometry)  # (B, L, groups, d_inner)
        norm = self.out_norm
        if fused_norms.norms_run(self.use_kernels):
            return self.out_proj(fused_norms.gated_norm(y, z, norm.weight, norm.bias, norm.eps))
        y = y.squeeze(2) if y.shape[2] == 1 else y.sum(2, dtype=torch.float32)
        y = F.layer_norm(
            y, norm.normalized_shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps
        ).view_as(u)
        return self.out_proj(y.to(z.dtype) * F.silu(z))

    def _scan(self, u: Tensor, geometry: GridGeometry) -> Tensor:
        num_directions = len(self.x_proj_weight)
        projected = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (num_directions, -1))
        dt, B, C = projected.split(self.splits, dim=-1)  # (B, L, K, r), (B, L, K, N), (B, L, K, N)
        return self.scan_backend.selective_scan(
            u,
            dt,
            self.dt_proj_weight,
            self.A_log,
            B,
            C,
            self.D,
            self.dt_proj_bias,
            geometry.paths,
        )
