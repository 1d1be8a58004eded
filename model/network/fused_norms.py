"""LayerNorm with its surroundings through the Triton kernels of `fused_norms_kernels.py`, and GELU in the
product before it: launch and operators, for inference.

They have no backward: the modules that call them keep a readable path of torch's operations, which is what
runs while gradients are recorded, and what torch.compile fuses by itself (`kernels_run`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network import fused_norms_kernels as kernels
from model.network.triton_jit import check_dtypes

HALF_DTYPES = (torch.bfloat16, torch.float16)
VECTOR = 8  # channels of a tile that a thread has: 16 bytes of the half precisions
# Two programs of four warps on each of an H100's 132 multiprocessors; with fewer tokens, more programs of
# fewer warps.
FILLING_PROGRAMS = 2 * 132


def kernels_run(use_kernels: bool) -> bool:
    """Whether a module that is told to `use_kernels` may use those without a backward."""
    return use_kernels and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    """How tokens are cut: a tile has `tokens` x `chunk` channels, `VECTOR` of them a thread."""

    chunk: int
    tokens: int
    num_warps: int

    @classmethod
    def of(cls, num_tokens: int, width: int) -> _Tiles:
        """A function of shapes alone: nothing is tuned in a request."""
        a_warp = 32 * VECTOR
        widest = 1 << (width - 1).bit_length()
        # No more tiles than 8: 64 channels a thread, which with their weights stay in registers.
        chunks = [widest // tiles for tiles in (1, 2, 4, 8) if widest // tiles >= min(VECTOR, widest)]
        # The fewest channels beyond the width; then, so that no sum crosses warps, the fewest warps a token;
        # then the fewest tiles.
        chunk = min(chunks, key=lambda size: (-(-width // size) * size, max(size, a_warp), -size))
        num_warps = max(1, chunk // a_warp)  # however many tokens: each is summed in the same order
        if num_tokens * chunk >= FILLING_PROGRAMS * 4 * a_warp:
            num_warps = max(4, num_warps)
        return cls(chunk=chunk, tokens=num_warps * a_warp // chunk, num_warps=num_warps)

    def grid(self, num_tokens: int) -> tuple[int]:
        return (-(-num_tokens // self.tokens),)

    def options(self, width: int) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        return {"D": width, "CHUNK": self.chunk, "TOKENS": self.tokens, "num_warps": self.num_warps}


@torch.library.custom_op("lamamba::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum, empty where there is no branch, and its norm."""
    x, (batch, width) = x.contiguous(), shift.shape
    branch = None if branch is None else branch.contiguous()
    given = [vector for vector in (shift, scale, gate) if vector is not None]
    if len({vector.stride(0) for vector in given}) > 1 or any(vector.stride(1) != 1 for vector in given):
        given = [vector.contiguous() for vector in given]
    (shift, scale), gate = given[:2], given[2] if len(given) > 2 else None
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    out = torch.empty_like(x)
    num_tokens = x.numel() // width
    tiles = _Tiles.of(num_tokens, width)
    with torch.cuda.device_of(x):
        kernels.residual_norm_kernel[tiles.grid(num_tokens)](
            *(x, branch, gate, weight, bias, shift, scale, total, out),
            *(num_tokens, num_tokens // batch, shift.stride(0), eps),
            **tiles.options(width),
        )
    return total, out


@_residual_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape)


@torch.library.custom_op("lamamba::gated_norm", mutates_args=())
def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y, z = y.contiguous(), _uniform_rows(z)
    groups = y.shape[-2]
    out, width = z.new_empty(z.shape), z.shape[-1]
    num_tokens = z.numel() // width
    tiles = _Tiles.of(num_tokens, width)
    with torch.cuda.device_of(z):
        kernels.gated_norm_kernel[tiles.grid(num_tokens)](
            *(y, z, weight, bias, out, num_tokens, z.stride(-2), eps),
            **(tiles.options(width) | {"GROUPS": groups}),
        )
    return out


@_gated_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.custom_op("lamamba::resampled_norm", mutates_args=())
def _resampled_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, merged: bool) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(_resampled(x.shape, factor, merged))
    *_, columns, width = out.shape
    num_tokens = out.numel() // width
    tiles = _Tiles.of(num_tokens, width)
    with torch.cuda.device_of(x):
        kernels.resampled_norm_kernel[tiles.grid(num_tokens)](
            *(x, weight, bias, out, num_tokens, columns, eps),
            **(tiles.options(width) | {"MERGED": merged, "FACTOR": factor}),
        )
    return out


@_resampled_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, merged: bool) -> Tensor:
    return x.new_empty(_resampled(x.shape, factor, merged))


def _resampled(shape: torch.Size, factor: int, merged: bool) -> tuple[int, ...]:
    batch, height, width, channels = shape
    if merged:
        return batch, height // factor, width // factor, channels * factor**2
    return batch, height * factor, width * factor, channels // factor**2


def _uniform_rows(tensor: Tensor) -> Tensor:
    """`tensor` with its tokens at one distance from each other, as in half of a projection's output."""
    strides = [tensor.stride(-2) * math.prod(tensor.shape[axis:-1]) for axis in range(1, tensor.ndim)]
    return tensor if tensor.stride() == (*strides, 1) else tensor.contiguous()


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`x + gate * branch`, and `LN(sum) * (1 + scale) + shift`, in x's dtype.

    The norm is of the sum before that is rounded to x's dtype.

    Args:
        x: `(B, ..., d)`. fp32, bf16 or fp16, like all that follow.
        branch, gate: like x, and `(B, d)`; both None for x alone, which is then returned as it is.
        weight, bias: `(d,)`, or None.
        shift, scale: `(B, d)`. Slices of a larger tensor, as `gate`, are read in place.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(x=x, branch=branch, gate=gate, weight=weight, bias=bias, shift=shift, scale=scale)
    total, out = _residual_norm(x, branch, gate, weight, bias, shift, scale, eps)
    return x if branch is None else total, out


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`LN(sum of y over groups) * SiLU(z)`, like z in shape and dtype.

    Args:
        y: `(..., groups, d)`, for each token of z in their order. fp32, bf16 or fp16, like all that follow.
        z: `(..., d)`; half of a projection's output is read in place.
        weight, bias: `(d,)`.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(y=y, z=z, weight=weight, bias=bias)
    return _gated_norm(y, z, weight, bias, eps)


def merged_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, factor: int) -> Tensor:
    """LayerNorm of the channels of f x f tokens each, rows fastest: `(B, H, W, d) -> (B, H/f, W/f, f^2 d)`.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(x=x, weight=weight, bias=bias)
    return _resampled_norm(x, weight, bias, eps, factor, True)


def expanded_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, factor: int) -> Tensor:
    """LayerNorm of each of the f x f tokens in the channels of one, columns fastest:
    `(B, H, W, f^2 d) -> (B, f H, f W, d)`.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(x=x, weight=weight, bias=bias)
    return _resampled_norm(x, weight, bias, eps, factor, False)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`GELU(linear(x))`, `(..., d) -> (..., n)`; on CUDA in the half precisions in one launch.

    GELU is then the product's epilogue, in its approximation by tanh: at most 5e-4 from the exact one,
    and 2e-4 of a result beyond 0.25, a tenth of what bf16 rounds off.
    """
    if x.is_cuda and x.dtype in HALF_DTYPES and weight.dtype == x.dtype:
        out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return out.unflatten(0, x.shape[:-1])
    return F.gelu(F.linear(x, weight, bias))
