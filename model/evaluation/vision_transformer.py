"""DINOv2's vision transformer (Oquab et al., "DINOv2: learning robust visual features without supervision",
2023) from a local folder, in torch alone.

A folder as transformers or as timm publishes it: config.json and model.safetensors. Its widths are read from
the shapes of its weights; heads are 64 wide in all four sizes (S, B, L, g).

    image (3, S, S) -> patches of 14 px, a class token before them, positions
        -> depth x (attention, MLP; each normalised before, scaled by channel, added) -> norm -> class token

The grid of positions is resized as DINOv2's own code does at a size it was not trained on: bicubic, by the
factor (S / 14 + 0.1) / side. The MLP is two layers with GELU, or in size g a SwiGLU.

Legend: n images, L tokens, d width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.messages import one_line

__all__ = ["HEAD_DIM", "VisionTransformer", "load_dinov2"]

HEAD_DIM = 64
_NORM_EPS = 1e-6
_MASK_TOKEN = "embeddings.mask_token"  # of training alone
_SIZES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1536: "ViT-g"}

# Names of transformers' layout, as patterns, and timm's, which the modules below have.
_TRANSFORMERS_NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale(1|2)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
)


class VisionTransformer(nn.Module):
    """Images (n, 3, S, S), normalised, S a multiple of the patch -> the class token (n, d)."""

    def __init__(
        self, *, width: int, depth: int, patch: int, grid: int, mlp_width: int, gated: bool = False
    ) -> None:
        """`grid`: the side of the trained positions; `mlp_width`: inputs of each MLP's second layer."""
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch = patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(_Block(width, mlp_width, gated=gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)

    @property
    def name(self) -> str:
        """As the paper calls this size."""
        width = self.pos_embed.shape[-1]
        return f"DINOv2 {_SIZES.get(width, f'width {width}')}/{self.patch}"

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)  # (n, d, S / patch, S / patch)
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (n, L, d)
        x = x + self._positions(patches.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _positions(self, side: int) -> Tensor:
        """(1, 1 + side^2, d)."""
        if side == self.grid:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = rest.unflatten(1, (self.grid, self.grid)).movedim(-1, 1)  # (1, d, grid, grid)
        factor = (side + 0.1) / self.grid
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


class _Block(nn.Module):
    """(n, L, d) in and out."""

    def __init__(self, width: int, mlp_width: int, *, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=_NORM_EPS) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": nn.Parameter(torch.ones(width))}) for _ in range(2))
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, 2 * mlp_width if gated else mlp_width),
                "fc2": nn.Linear(mlp_width, width),
            }
        )
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1["gamma"] * self._attention(self.norm1(x))
        return x + self.ls2["gamma"] * self._mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.attn["qkv"](x).unflatten(-1, (3, -1, HEAD_DIM)).movedim(1, 3).unbind(1)
        )  # (n, heads, L, 64)
        return self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.mlp["fc1"](x)
        if not self.gated:
            return self.mlp["fc2"](F.gelu(x))
        gate, value = x.chunk(2, dim=-1)
        return self.mlp["fc2"](F.silu(gate) * value)


def load_dinov2(folder: Path) -> VisionTransformer:
    """The network of a folder in transformers' or timm's layout, frozen, in evaluation mode, on the CPU.

    ValueError names the file and what is wrong with it.
    """
    weights = _read(folder)
    try:
        if "embeddings.cls_token" in weights:
            weights = _as_timm(weights)
        fc1, fc2 = weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc2.weight"]
        network = VisionTransformer(
            width=weights["cls_token"].shape[-1],
            depth=1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks.")),
            patch=weights["patch_embed.proj.weight"].shape[-1],
            grid=round((weights["pos_embed"].shape[1] - 1) ** 0.5),
            mlp_width=fc2.shape[1],
            gated=fc1.shape[0] == 2 * fc2.shape[1],
        )
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise _unfit(folder, one_line(error)) from error
    return network.eval().requires_grad_(False)


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _unfit(folder, one_line(error)) from error
    fields: dict[str, Any] = config if isinstance(config, dict) else {}
    kind = str(fields.get("model_type", fields.get("architecture", "")))
    if "dinov2" not in kind or "reg" in kind:
        raise _unfit(folder, f"config.json is of {kind!r}")
    heads = fields.get("num_attention_heads")
    if heads is not None and fields.get("hidden_size") != HEAD_DIM * heads:
        raise _unfit(
            folder, f"config.json: num_attention_heads {heads} for hidden_size {fields.get('hidden_size')}"
        )
    return {name.removeprefix("dinov2."): value.float() for name, value in weights.items()}


def _unfit(folder: Path, why: str) -> ValueError:
    return ValueError(
        f"extractor: {folder} given; a DINOv2 folder without registers is accepted, with the config.json and "
        f"model.safetensors of transformers or timm ({why})"
    )


def _as_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' layout under timm's names; queries, keys and values in one matrix."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        part = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)", name)
        if part:
            parts = [weights[name.replace(".query.", f".{kind}.")] for kind in ("query", "key", "value")]
            renamed[f"blocks.{part[1]}.attn.qkv.{part[2]}"] = torch.cat(parts)
        elif ".attention.attention." not in name and name != _MASK_TOKEN:
            renamed[_timm_name(name)] = value
    return renamed


def _timm_name(name: str) -> str:
    for pattern, replacement in _TRANSFORMERS_NAMES:
        renamed, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return renamed
    return name
