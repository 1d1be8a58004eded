"""The LaMamba block (paper Figure 3, right): VSSM, local attention, FFN, each a residual under AdaLN-zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LaMambaConfig
from model.network.attention import WindowAttention
from model.network.geometry import GridGeometry
from model.network.scan import ScanBackend
from model.network.scan.paths import NUM_DIRECTIONS
from model.network.vssm import VisualStateSpace


class LaMambaBlock(nn.Module):
    """`(B, H, W, d)` and AdaLN vectors `(B, 9d)` to `(B, H, W, d)`; the identity at initialisation.

        x = x + gate * VSSM(modulate(LN(x)))
        x = x + gate * attention(modulate(LN(x)))
        x = x + gate * FFN(modulate(LN(x)))

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
        self.has_attention = config.attention != "none"
        self.conditioning_proj = (
            nn.Linear(config.conditioning_size, width) if project_conditioning else nn.Identity()
        )
        self.modulation = nn.Linear(width, (9 if self.has_attention else 6) * width)
        self.vssm_norm = nn.LayerNorm(width)
        self.vssm = VisualStateSpace(
            width,
            d_state=config.d_state,
            num_directions=NUM_DIRECTIONS[config.vssm],
            conv_bias=config.conv_bias,
            scan_backend=scan_backend,
        )
        if self.has_attention:
            self.attention_norm = nn.LayerNorm(width)
            self.attention = WindowAttention(
                width, num_heads=config.num_heads, window_size=window_size, shifted=shifted
            )
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def adaln_vectors(self, c: Tensor) -> Tensor:
        """What `forward` takes of the conditioning c `(B, C)`: `(B, 9d)`, without attention `(B, 6d)`."""
        return self.modulation(F.silu(self.conditioning_proj(c)))

    def forward(self, x: Tensor, vectors: Tensor, geometry: GridGeometry) -> Tensor:
        vectors = vectors[:, None, None]  # (B, 1, 1, 9d)
        if self.has_attention:
            vssm, attention, ffn = vectors.chunk(3, dim=-1)
        else:
            vssm, ffn = vectors.chunk(2, dim=-1)

        shift, scale, gate = vssm.chunk(3, dim=-1)  # (B, 1, 1, d) each
        x = x + gate * self.vssm(modulate(self.vssm_norm(x), shift, scale), geometry)
        if self.has_attention:
            shift, scale, gate = attention.chunk(3, dim=-1)
            x = x + gate * self.attention(modulate(self.attention_norm(x), shift, scale), geometry)
        shift, scale, gate = ffn.chunk(3, dim=-1)
        return x + gate * self.ffn(modulate(self.ffn_norm(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN's affine map, `x * (1 + scale) + shift`."""
    return x * (1 + scale) + shift
