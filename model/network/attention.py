"""(Shifted-)window attention with a relative position bias (Swin, Liu et al. 2021; paper section 3.1,
equation 2).

In torch's path windows and heads share one axis, so the bias and the shift mask broadcast over the batch and
nothing is repeated. The kernels of `window_attention.py` compute the same in one pass over qkv.

With `qk_norm` queries and keys pass an RMSNorm over the channels of their head first, q / sqrt(mean(q^2) +
eps) * weight, with one weight for all heads (as ViT-22B, arXiv 2302.05442): logits then cannot grow with the
weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.network import window_attention
from model.network.geometry import GridGeometry


class WindowAttention(nn.Module):
    """Self-attention among the tokens of each window, `(B, H, W, d) -> (B, H, W, d)`.

    Args:
        width: d, divisible by `num_heads`.
        window_size: side of the windows that the bias table is made for; a grid may use smaller ones.
        shifted: roll the grid by half a window first (every second block), where the grid shifts at all.
        qk_norm: normalise queries and keys.

    `use_kernels` is set by whoever loads the network (`LaMambaDiff.use_scan_backend`); windows that the
    kernels do not accept stay torch's.
    """

    def __init__(
        self, width: int, *, num_heads: int, window_size: int, shifted: bool, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.shifted = shifted
        self.use_kernels = False
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        # Of the queries' norm, then of the keys'.
        self.qk_norm_weight = nn.Parameter(torch.ones(2, self.head_dim)) if qk_norm else None

    def forward(self, x: Tensor, geometry: GridGeometry) -> Tensor:
        assert geometry.window is not None
        if self.use_kernels and window_attention.accepts(geometry.window, self.head_dim):
            shift = geometry.shift if self.shifted else (0, 0)
            x = window_attention.window_attention(
                self.qkv(x),
                self.relative_position_bias,
                self.qk_norm_weight,
                window=geometry.window,
                shift=shift,
            )
            return self.proj(x)
        shift_rows, shift_columns = geometry.shift
        shifted = any(geometry.shift) and self.shifted
        if shifted:
            x = x.roll((-shift_rows, -shift_columns), dims=(1, 2))
        m, n = geometry.window
        q, k, v = rearrange(
            self.qkv(x),
            "b (h m) (w n) (three heads d) -> three b (h w heads) (m n) d",
            m=m,
            n=n,
            three=3,
            heads=self.num_heads,
        )  # (B, windows * heads, M*M, head_dim)
        if self.qk_norm_weight is not None:
            q, k = (
                F.rms_norm(x, (self.head_dim,), weight.to(x.dtype), window_attention.QK_NORM_EPS)
                for x, weight in zip((q, k), self.qk_norm_weight, strict=True)
            )
        # A mask with all four axes: CPUs have a fused kernel for those and for none with three.
        bias = self._bias(geometry, shifted).to(q.dtype).unsqueeze(0)  # (1, windows * heads, M*M, M*M)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = rearrange(
            x,
            "b (h w heads) (m n) d -> b (h m) (w n) (heads d)",
            h=geometry.height // m,
            heads=self.num_heads,
            m=m,
        )  # (B, H, W, d)
        x = self.proj(x)
        return x.roll((shift_rows, shift_columns), dims=(1, 2)) if shifted else x

    def _bias(self, geometry: GridGeometry, shifted: bool) -> Tensor:
        assert geometry.window is not None
        num_windows = (geometry.height // geometry.window[0]) * (geometry.width // geometry.window[1])
        bias = self.relative_position_bias[geometry.bias_index].permute(2, 0, 1)  # (heads, M*M, M*M)
        if shifted:
            return (bias + geometry.shift_mask).flatten(0, 1)  # (windows * heads, M*M, M*M)
        return bias.repeat(num_windows, 1, 1)
