"""Window attention through the Triton kernels of `window_attention_kernels.py`: launch, operators, gradient.

What `attention.WindowAttention` computes between its two projections, the roll and its inverse included. The
module's own path is the readable reference, and what runs where these kernels do not. They run where the
Triton scan does (`scan.triton_scan.is_available`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.network import window_attention_kernels as kernels
from model.network.triton_jit import check_dtypes, needs_gradient

# A window is one tile of logits, held in registers four times over (logits, their gradient, the bias, its
# gradient): 64 x 64 is what they hold. Larger windows (16 x 16, global attention) are left to torch.
MAX_TOKENS = 64
MAX_HEAD_DIM = 128
# Compiled for head dims of 20, 40 and 80, registers and shared memory let 4 or 3 forward programs onto each
# of an H100's 132 multiprocessors, and 2 backward ones. The forward starts 3 or 4 rounds of them, which evens
# out their ends and leaves some 20 windows to a program and its bias (128 rows of 32 x 32 tokens). The
# backward starts one round: each of its programs writes a partial sum of 16 KiB for the bias.
FORWARD_PROGRAMS = 12 * 132
BACKWARD_PROGRAMS = 2 * 132
QK_NORM_EPS = 1e-6
TABLE_ENTRIES = 16  # rows of the bias table that a program of `bias_grad_kernel` sums


def accepts(window: tuple[int, int], head_dim: int) -> bool:
    """Whether the kernels take windows of `(rows, columns)` tokens and heads of `head_dim` channels."""
    return math.prod(window) <= MAX_TOKENS and head_dim <= MAX_HEAD_DIM


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """What all kernels are told: the number of windows, how many programs share them, the tiles."""

    num_windows: int
    chunks: int
    """Programs of a head; each visits every `chunks`-th window."""
    scale: float
    shape: dict[str, int]
    """Compile-time arguments: all that does not change with the batch."""
    num_warps: int
    num_stages: int

    @classmethod
    def of(
        cls,
        qkv: Tensor,
        table: Tensor,
        window: Sequence[int],
        shift: Sequence[int],
        *,
        qk_norm: bool,
        programs: int,
    ) -> _Launch:
        """A function of shapes alone: nothing is tuned in a request."""
        (batch, height, width, channels), num_heads = qkv.shape, table.shape[1]
        head_dim, tokens = channels // 3 // num_heads, math.prod(window)
        num_windows = batch * (height // window[0]) * (width // window[1])
        # As many programs as fill the device, and as few as then have as many windows each.
        windows_each = -(-num_windows // max(1, programs // num_heads))
        block_t, block_d = _block(tokens), _block(head_dim)
        return cls(
            num_windows=num_windows,
            chunks=-(-num_windows // windows_each),
            scale=head_dim**-0.5 * math.log2(math.e),
            shape={
                "HEADS": num_heads,
                "HEAD_DIM": head_dim,
                "WINDOW_ROWS": window[0],
                "WINDOW_COLUMNS": window[1],
                "SHIFT_ROWS": shift[0],
                "SHIFT_COLUMNS": shift[1],
                "TABLE_WINDOW": (math.isqrt(len(table)) + 1) // 2,
                "BLOCK_T": block_t,
                "BLOCK_D": block_d,
                "QK_NORM": qk_norm,
            },
            # 16 rows of the tile a warp, as tensor cores cut it: no row's softmax crosses warps.
            num_warps=block_t // 16,
            # 2: the next window is fetched while this one is computed. Rows over 128 bytes would take the
            # shared memory of another program for it, which hides the wait as well.
            num_stages=2 if block_d * qkv.element_size() <= 128 else 1,
        )

    @property
    def options(self) -> dict[str, int]:
        return self.shape | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _block(size: int) -> int:
    """The power of two from `size` on; tensor cores take sides of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


@torch.library.custom_op("lamamba::window_attention_forward", mutates_args=())
def _forward(
    qkv: Tensor, table: Tensor, norm_weight: Tensor | None, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    qkv, table = qkv.contiguous(), table.contiguous()
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    qk_norm = norm_weight is not None
    launch = _Launch.of(qkv, table, window, shift, qk_norm=qk_norm, programs=FORWARD_PROGRAMS)
    with torch.cuda.device_of(qkv):
        kernels.window_attention_fwd_kernel[(launch.chunks * table.shape[1],)](
            *(qkv, table, table if norm_weight is None else norm_weight.contiguous(), out),
            *(launch.num_windows, *qkv.shape[1:3], launch.scale, QK_NORM_EPS),
            **launch.options,
        )
    return out


@_forward.register_fake
def _(
    qkv: Tensor, table: Tensor, norm_weight: Tensor | None, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


@torch.library.custom_op("lamamba::window_attention_backward", mutates_args=())
def _backward(
    qkv: Tensor,
    table: Tensor,
    norm_weight: Tensor | None,
    dout: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and, in fp32, of the table and of the norms' weight, `(2, head_dim)` or empty."""
    qkv, table, dout = qkv.contiguous(), table.contiguous(), dout.contiguous()
    num_heads, qk_norm = table.shape[1], norm_weight is not None
    launch = _Launch.of(qkv, table, window, shift, qk_norm=qk_norm, programs=BACKWARD_PROGRAMS)
    block_t = launch.shape["BLOCK_T"]
    dqkv = torch.empty_like(qkv)
    dtable = torch.empty_like(table, dtype=torch.float32)
    dbias = table.new_empty((launch.chunks, num_heads, block_t, block_t), dtype=torch.float32)
    head_dim = launch.shape["HEAD_DIM"]
    dweight = table.new_empty((launch.chunks * num_heads, 2, head_dim) if qk_norm else 0, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        kernels.window_attention_bwd_kernel[(launch.chunks * num_heads,)](
            *(qkv, table, table if norm_weight is None else norm_weight.contiguous()),
            *(dout, dqkv, dbias, dweight),
            *(launch.num_windows, *qkv.shape[1:3], launch.scale, QK_NORM_EPS),
            **launch.options,
        )
        names = ("HEADS", "WINDOW_ROWS", "WINDOW_COLUMNS", "TABLE_WINDOW", "BLOCK_T")
        kernels.bias_grad_kernel[(-(-len(table) // TABLE_ENTRIES) * num_heads,)](
            dbias.sum(0), dtable, **{name: launch.shape[name] for name in names}, ENTRIES=TABLE_ENTRIES
        )
    return dqkv, dtable, dweight.sum(0) if qk_norm else dweight


@_backward.register_fake
def _(
    qkv: Tensor,
    table: Tensor,
    norm_weight: Tensor | None,
    dout: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        torch.empty_like(table, dtype=torch.float32, memory_format=torch.contiguous_format),
        table.new_empty(0 if norm_weight is None else norm_weight.shape, dtype=torch.float32),
    )


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        table: Tensor,
        norm_weight: Tensor | None,
        window: Sequence[int],
        shift: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(qkv, table, norm_weight)
        ctx.window, ctx.shift = window, shift
        return _forward(qkv, table, norm_weight, window, shift)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table, norm_weight = ctx.saved_tensors
        dqkv, dtable, dweight = _backward(qkv, table, norm_weight, dout, ctx.window, ctx.shift)
        return (
            dqkv,
            dtable.to(table.dtype),
            None if norm_weight is None else dweight.to(norm_weight.dtype),
            None,
            None,
        )


def window_attention(
    qkv: Tensor,
    table: Tensor,
    norm_weight: Tensor | None = None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> Tensor:
    """Attention among the tokens of each window, `(B, H, W, 3d) -> (B, H, W, d)`; softmax in fp32.

    Args:
        qkv: queries, keys and values; the last axis is read as (3, heads, d / heads). fp32, bf16 or fp16.
        table: `((2M - 1)**2, heads)`, the relative position bias of windows up to M a side; same dtypes.
        norm_weight: `(2, d / heads)`, of the RMSNorm of queries, then of keys; None norms neither.
        window: `(rows, columns)` of a window, dividing H and W, as `accepts` takes them.
        shift: tokens by which the grid is rolled first, `(0, 0)` for none.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(qkv=qkv, table=table, norm_weight=norm_weight)
    if needs_gradient(qkv, table, norm_weight):
        return _WindowAttention.apply(qkv, table, norm_weight, window, shift)
    return _forward(qkv, table, norm_weight, window, shift)
