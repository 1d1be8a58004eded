"""Between the levels of the U-Net (paper section 3.2): patch merging, patch expanding, and how a skip joins.

Channels-last throughout; both resamplings are Swin-UNet's (Cao et al. 2021).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from model.network import fused_norms


class PatchMerging(nn.Module):
    """`(B, H, W, d) -> (B, H/2, W/2, out_width)`: four neighbours, LayerNorm, linear.

    `use_kernels` is set by whoever loads the network (`LaMambaDiff.use_scan_backend`).
    """

    use_kernels: bool = False

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if fused_norms.kernels_run(self.use_kernels):
            return self.reduction(fused_norms.merged_norm(x, norm.weight, norm.bias, norm.eps, factor=2))
        # Rows vary fastest among the four: (0,0), (1,0), (0,1), (1,1).
        x = rearrange(x, "b (h p1) (w p2) d -> b h w (p2 p1 d)", p1=2, p2=2)
        return self.reduction(norm(x))


class PatchExpanding(nn.Module):
    """`(B, H, W, d) -> (B, f H, f W, out_width)`: linear, channels spread over the grid, LayerNorm.

    `use_kernels` is set by whoever loads the network (`LaMambaDiff.use_scan_backend`).
    """

    use_kernels: bool = False

    def __init__(self, width: int, out_width: int, *, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(width, factor**2 * out_width, bias=False)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, x: Tensor) -> Tensor:
        p, norm, x = self.factor, self.norm, self.expand(x)
        if fused_norms.kernels_run(self.use_kernels):
            return fused_norms.expanded_norm(x, norm.weight, norm.bias, norm.eps, factor=p)
        return norm(rearrange(x, "b h w (p1 p2 d) -> b (h p1) (w p2) d", p1=p, p2=p))


class AddSkip(nn.Module):
    """`x + skip`, the paper's choice."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip


class ConcatSkip(nn.Module):
    """Table 4's "Concatenate": the concatenated channels through a 3x3 convolution back to d, then LayerNorm.

    The released code reinterprets channels-last memory as channels-first here; this is the operation it
    meant, with LayerNorm for its BatchNorm, whose statistics would tie the images of a batch together.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, width, kernel_size=3, padding=1, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([x, skip], dim=-1).permute(0, 3, 1, 2)  # (B, 2d, H, W), channels-last in memory
        return self.norm(self.conv(x).permute(0, 2, 3, 1))
