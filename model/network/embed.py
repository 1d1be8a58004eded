"""Embeddings of the timestep, the label and the latents, and the initial position table (DiT, Peebles & Xie
2023).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SINUSOID_SIZE = 256
_MAX_PERIOD = 10_000
# The null class in diffusers' DiTPipeline, which knows ImageNet only.
DIFFUSERS_NULL_LABEL = 1000


class TimestepEmbedding(nn.Module):
    """Timesteps `(B,)`, fractions allowed, to `(B, C)`: sinusoid, linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_SIZE, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        x = sinusoid(timestep).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(timestep: Tensor) -> Tensor:
    """`(B,) -> (B, 256)` in fp32: cosines, then sines, of t * exp(-ln(10000) i / 128).

    fp32 and this order of operations whatever the network's dtype: at t = 999 one ulp of a frequency moves
    the angle by 6e-5.
    """
    half = SINUSOID_SIZE // 2
    i = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(_MAX_PERIOD) * i / half)
    angles = timestep.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedding(nn.Module):
    """Labels `(B,)` int64 to `(B, C)`. Row `num_classes` is the null class; an unconditional network has that
    row alone.

    Labels are dropped by whoever trains the network, as a function of the sample (`training.trainer`).
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(self._with_null_row(labels))

    def _with_null_row(self, labels: Tensor) -> Tensor:
        if self.num_classes == 0:
            return torch.zeros_like(labels)
        if self.num_classes < DIFFUSERS_NULL_LABEL:
            labels = labels.masked_fill(labels == DIFFUSERS_NULL_LABEL, self.num_classes)
        return labels


def timestep_rows(timestep: Tensor | float, rows: int, device: torch.device) -> Tensor:
    """A timestep as diffusers' callers give it (a number, a 0-d tensor, one for all rows or one each) as
    `(rows,)`.
    """
    if not isinstance(timestep, Tensor):
        if not isinstance(timestep, int | float):
            raise ValueError(f"timestep: a {type(timestep).__name__} given; a number or a tensor is accepted")
        timestep = torch.tensor(timestep, device=device)
    if timestep.ndim == 0:
        return timestep.to(device).expand(rows)
    if timestep.ndim > 1 or timestep.shape[0] not in (1, rows):
        raise ValueError(f"timestep: shape {tuple(timestep.shape)} given; a scalar or ({rows},) is accepted")
    return timestep.expand(rows)


def check_latents(latents: Tensor, in_channels: int, patch_size: int) -> None:
    """Raise ValueError for latents that are not `(B, in_channels, H, W)` with whole patches."""
    if latents.ndim != 4 or latents.shape[1] != in_channels or any(s % patch_size for s in latents.shape[2:]):
        sides = f", H and W multiples of {patch_size}" if patch_size > 1 else ""
        raise ValueError(
            f"hidden_states: shape {tuple(latents.shape)} given; (B, {in_channels}, H, W){sides} is accepted"
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a label outside 0..num_classes (and 1000, diffusers' null class; with more classes
    than that, 1000 is one of them).

    On CUDA a check would stop the host at every step: there the embedding's own bounds assertion answers.
    """
    if num_classes == 0 or labels.is_cuda or labels.is_meta:
        return
    wrong = (labels < 0) | ((labels > num_classes) & (labels != DIFFUSERS_NULL_LABEL))
    if bool(wrong.any()):
        also = f" or {DIFFUSERS_NULL_LABEL}" if num_classes < DIFFUSERS_NULL_LABEL else ""
        raise ValueError(
            f"class_labels: {int(labels[wrong][0])} given; this network accepts 0 to {num_classes - 1}, and "
            f"{num_classes}{also} for the null class"
        )


class PatchEmbed(nn.Module):
    """Latents `(B, C, H, W)` to tokens `(B, H/p, W/p, D)`: one linear map a patch, then LayerNorm."""

    def __init__(self, in_channels: int, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, latents: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(latents, "b c (h p1) (w p2) -> b h w (c p1 p2)", p1=p, p2=p)
        return self.norm(self.proj(patches.contiguous()))  # contiguous: torch adds the bias in the product


def position_table(side: int, width: int) -> Tensor:
    """The initial position parameter `(1, side, side, width)`: sines and cosines of the column, then of the
    row.
    """
    frequencies = 1.0 / _MAX_PERIOD ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64).unsqueeze(1) * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns, rows = axis.expand(side, -1, -1), axis.unsqueeze(1).expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).float().unsqueeze(0)


def resized_position_table(table: Tensor, height: int, width: int) -> Tensor:
    """`table` (1, R, R, D) for a grid of another size, `(1, height, width, D)`, by bicubic interpolation."""
    if table.shape[1:3] == (height, width):
        return table
    resized = F.interpolate(
        table.movedim(-1, 1).float(), (height, width), mode="bicubic", align_corners=False
    )
    return resized.movedim(1, -1).to(table.dtype)
