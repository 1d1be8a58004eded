"""The LaMamba block (paper Figure 3, right): VSSM, local attention, FFN, each a residual under AdaLN-zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LaMambaConfig
from model.network.attention import WindowAttention
from model.network.fused_norms import kernels_run, linear_gelu, norms_run
from model.network.geometry import GridGeometry
from model.network.residual import Residual, ResidualNorm
from model.network.scan import ScanBackend
from model.network.scan.paths import NUM_DIRECTIONS
from model.network.vssm import VisualStateSpace


class LaMambaBlock(nn.Module):
    """A residual of `(B, H, W, d)` and AdaLN vectors `(B, 9d)` to such a residual; the identity at
    initialisation.

        x = x + gate * VSSM(modulate(LN(x)))
        x = x + gate * attention(modulate(LN(x)))
        x = x + gate * FFN(modulate(LN(x)))

    Each sum is made by the norm that follows it (`ResidualNorm`), where kernels do that also the last: by the
    next block's. `use_kernels` is set by whoever loads the network (`LaMambaDiff.use_scan_backend`).

    Args:
        config: the network's.
        width: d.
        window_size: side of this stage's attention windows.
        shifted: whether its windows are shifted.
        project_conditioning: give the block its own linear map of the conditioning vector. Decoder blocks
            always have one; the others where their width is not that of the vector.
    """

    def __init__(
        self,
        config: LaMambaConfig,
        width: int,
        *,
        window_size: int,
        shifted: bool,
        project_conditioning: bool,
        scan_backend: ScanBackend,
    ) -> None:
        super().__init__()
        self.use_kernels = False
        self.has_attention = config.attention != "none"
        self.conditioning_proj = (
            nn.Linear(config.conditioning_size, width) if project_conditioning else nn.Identity()
        )
        self.modulation = nn.Linear(width, (9 if self.has_attention else 6) * width)
        self.vssm_norm = ResidualNorm(width)
        self.vssm = VisualStateSpace(
            width,
            d_state=config.d_state,
            num_directions=NUM_DIRECTIONS[config.vssm],
            conv_bias=config.conv_bias,
            scan_backend=scan_backend,
        )
        if self.has_attention:
            self.attention_norm = ResidualNorm(width)
            self.attention = WindowAttention(
                width,
                num_heads=config.num_heads,
                window_size=window_size,
                shifted=shifted,
                qk_norm=config.qk_norm,
            )
        self.ffn_norm = ResidualNorm(width)
        self.ffn = FeedForward(width)

    def adaln_vectors(self, c: Tensor) -> Tensor:
        """What `forward` takes of the conditioning c `(B, C)`: `(B, 9d)`, without attention `(B, 6d)`."""
        return self.modulation(F.silu(self.conditioning_proj(c)))

    def forward(self, residual: Residual, vectors: Tensor, geometry: GridGeometry) -> Residual:
        if self.has_attention:
            vssm, attention, ffn = vectors.chunk(3, dim=-1)  # (B, 3d) each
        else:
            vssm, ffn = vectors.chunk(2, dim=-1)

        shift, scale, gate = vssm.chunk(3, dim=-1)  # (B, d) each
        x, h = self.vssm_norm(residual, shift, scale)
        residual = Residual(x, self.vssm(h, geometry), gate)
        if self.has_attention:
            shift, scale, gate = attention.chunk(3, dim=-1)
            x, h = self.attention_norm(residual, shift, scale)
            residual = Residual(x, self.attention(h, geometry), gate)
        shift, scale, gate = ffn.chunk(3, dim=-1)
        x, h = self.ffn_norm(residual, shift, scale)
        residual = Residual(x, self.ffn(h), gate)
        return residual if norms_run(self.use_kernels) else Residual(residual.sum())


class FeedForward(nn.Sequential):
    """Linear, GELU, linear: `(..., d) -> (..., d)`, four times as wide inside.

    `use_kernels` is set by whoever loads the network (`LaMambaDiff.use_scan_backend`).
    """

    use_kernels: bool = False

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        widen, gelu, narrow = self
        if kernels_run(self.use_kernels):
            assert isinstance(widen, nn.Linear)
            return narrow(linear_gelu(x, widen.weight, widen.bias))
        return narrow(gelu(widen(x)))
