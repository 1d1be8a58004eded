"""LayerNorm with its surroundings through the Triton kernels of `fused_norms_kernels.py`, and GELU in the
product before it: launch, operators, gradients.

The modules that call them keep a readable path of torch's operations. It is what runs where `kernels_run` and
`norms_run` say so: the norms of resampling and GELU have no backward, and in inference torch.compile fuses
all of it by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network import fused_norms_kernels as kernels
from model.network.triton_jit import check_dtypes, needs_gradient

HALF_DTYPES = (torch.bfloat16, torch.float16)
VECTOR_BYTES = 16  # of a tile that a thread has: one load
# Two programs of four warps on each of an H100's 132 multiprocessors; with fewer tokens, more programs of
# fewer warps.
FILLING_PROGRAMS = 2 * 132
BACKWARD_PROGRAMS = 2 * FILLING_PROGRAMS  # about, where there are tokens for them
MAX_TOKENS_A_PART = 256  # of a program of the backward
# Channels of a backward's load, and how many of its tiles are under way: fastest on an H200 at XL's sizes.
RESIDUAL_NORM_VECTOR, RESIDUAL_NORM_STAGES = 2, 1
GATED_NORM_VECTOR, GATED_NORM_STAGES = 4, 3


def kernels_run(use_kernels: bool) -> bool:
    """Whether a module that is told to `use_kernels` may use those without a backward."""
    return use_kernels and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def norms_run(use_kernels: bool) -> bool:
    """Whether a module that is told to `use_kernels` uses `residual_norm` and `gated_norm`."""
    return use_kernels and (torch.is_grad_enabled() or not torch.compiler.is_compiling())


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    """How tokens are cut: a tile has `tokens` x `chunk` channels."""

    chunk: int
    tokens: int
    num_warps: int

    @classmethod
    def of(cls, num_tokens: int, width: int, *, vector: int) -> _Tiles:
        """A function of shapes alone: nothing is tuned in a request. `vector`: channels of one load."""
        a_warp = 32 * vector
        widest = 1 << (width - 1).bit_length()
        # No more tiles than 8: at most 64 channels a thread, which with their weights stay in registers.
        chunks = [widest // tiles for tiles in (1, 2, 4, 8) if widest // tiles >= min(vector, widest)]
        # The fewest channels beyond the width; then, so that no sum crosses warps, the fewest warps a token;
        # then the fewest tiles.
        chunk = min(chunks, key=lambda size: (-(-width // size) * size, max(size, a_warp), -size))
        num_warps = max(1, chunk // a_warp)  # however many tokens: each is summed in the same order
        if num_tokens * chunk >= FILLING_PROGRAMS * 4 * a_warp:
            num_warps = max(4, num_warps)
        return cls(chunk=chunk, tokens=num_warps * a_warp // chunk, num_warps=num_warps)

    @classmethod
    def of_forward(cls, tokens: Tensor, num_tokens: int, width: int) -> _Tiles:
        return cls.of(num_tokens, width, vector=VECTOR_BYTES // tokens.element_size())

    def grid(self, num_tokens: int) -> tuple[int]:
        return (-(-num_tokens // self.tokens),)

    def options(self, width: int) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        return {"D": width, "CHUNK": self.chunk, "TOKENS": self.tokens, "num_warps": self.num_warps}


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How runs of tokens, whose gradients are summed apart, are cut for a backward."""

    tiles: _Tiles
    run: int
    part: int
    """Tokens of a program: whole tiles."""
    parts: int
    """Programs of a run."""

    @classmethod
    def of(cls, runs: int, run: int, width: int, *, vector: int) -> _Cut:
        tiles = _Tiles.of(runs * run, width, vector=vector)
        about = min(MAX_TOKENS_A_PART, max(1, runs * run // BACKWARD_PROGRAMS))
        part = -(-run // max(1, run // about))
        part = -(-part // tiles.tokens) * tiles.tokens
        return cls(tiles=tiles, run=run, part=part, parts=-(-run // part))


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
    (shift, scale, gate), vectors_stride = _in_one_distance(shift, scale, gate)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=shift.dtype)
    num_tokens = x.numel() // width
    tiles = _Tiles.of_forward(x, num_tokens, width)
    with torch.cuda.device_of(x):
        kernels.residual_norm_kernel[tiles.grid(num_tokens)](
            *(x, branch, gate, weight, bias, shift, scale, total, out),
            *(num_tokens, num_tokens // batch, vectors_stride, eps),
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
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=shift.dtype)


@torch.library.custom_op("lamamba::residual_sum", mutates_args=())
def _residual_sum(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    x, branch, (batch, width) = x.contiguous(), branch.contiguous(), gate.shape
    (gate,), vectors_stride = _in_one_distance(gate)
    total, num_tokens = torch.empty_like(x), x.numel() // width
    tiles = _Tiles.of_forward(x, num_tokens, width)
    with torch.cuda.device_of(x):
        kernels.residual_norm_kernel[tiles.grid(num_tokens)](
            *(x, branch, gate, None, None, None, None, total, None),
            *(num_tokens, num_tokens // batch, vectors_stride, 0.0),
            **tiles.options(width),
        )
    return total


@_residual_sum.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _in_one_distance(*vectors: Tensor | None) -> tuple[list[Any], int]:
    """Vectors `(B, d)` whose rows lie equally far apart, and how far; copies where they do not."""
    given = [vector for vector in vectors if vector is not None]
    if len({vector.stride(0) for vector in given}) > 1 or any(vector.stride(1) != 1 for vector in given):
        vectors = tuple(None if vector is None else vector.contiguous() for vector in vectors)
    return list(vectors), next(vector.stride(0) for vector in vectors if vector is not None)


@torch.library.custom_op("lamamba::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    total: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    dtotal: Tensor | None,
    dout: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, empty without a norm, and of the branch, empty without one; and the partial sums of
    `residual_norm_bwd_kernel`, to add over their second axis.
    """
    total, branch, dtotal, dout = (
        tensor if tensor is None else tensor.contiguous() for tensor in (total, branch, dtotal, dout)
    )
    (gate, scale), vectors_stride = _in_one_distance(gate, scale)
    dx, dbranch, sums, cut = _residual_norm_gradients(total, branch, dtotal, dout, gate, scale)
    batch, parts, num_sums, width = sums.shape
    with torch.cuda.device_of(sums):
        kernels.residual_norm_bwd_kernel[(batch * parts,)](
            *(total, branch, gate, weight, scale, dtotal, dout, dx, dbranch, sums),
            *(cut.run, cut.part, parts, vectors_stride, eps),
            **(cut.tiles.options(width) | {"SUMS": num_sums, "STAGES": RESIDUAL_NORM_STAGES}),
        )
    return dx, dbranch, sums


@_residual_norm_backward.register_fake
def _(
    total: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    dtotal: Tensor | None,
    dout: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _residual_norm_gradients(total, branch, dtotal, dout, gate, scale)[:3]


def _residual_norm_gradients(
    total: Tensor | None,
    branch: Tensor | None,
    dtotal: Tensor | None,
    dout: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, _Cut]:
    """Room for what `_residual_norm_backward` returns, and how its tokens are cut: each row's by itself."""
    tokens, vectors = total if dtotal is None else dtotal, gate if scale is None else scale
    assert tokens is not None
    assert vectors is not None
    batch, width = vectors.shape
    cut = _Cut.of(batch, tokens.numel() // (batch * width), width, vector=RESIDUAL_NORM_VECTOR)
    num_sums = (0 if dout is None else 2) + (branch is not None)
    return (
        tokens.new_empty(0 if dout is None else tokens.shape),
        tokens.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        tokens.new_empty((batch, cut.parts, num_sums, width), dtype=torch.float32),
        cut,
    )


class _ResidualNorm(torch.autograd.Function):
    """The sum and its norm, or, without a branch, the norm of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        eps: float,
    ) -> Any:
        total, out = _residual_norm(x, branch, gate, weight, bias, shift, scale, eps)
        ctx.save_for_backward(x if branch is None else total, branch, gate, weight, bias, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return out if branch is None else (total, out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, branch, gate, weight, bias, scale = ctx.saved_tensors
        dtotal, dout = (None, *gradients) if branch is None else gradients
        dx, dbranch, partial = _residual_norm_backward(
            total, branch, gate, weight, scale, dtotal, dout, ctx.eps
        )
        of_out, of_normalized, *of_gate = partial.sum(1).unbind(1)  # (B, d) each
        dscale = of_normalized if weight is None else of_normalized * weight + of_out * bias
        scale_by = 1 + scale.float()
        return (
            dx,
            None if branch is None else dbranch,
            None if gate is None else of_gate[0].to(gate.dtype),
            None if weight is None else (scale_by * of_normalized).sum(0).to(weight.dtype),
            None if bias is None else (scale_by * of_out).sum(0).to(bias.dtype),
            of_out.to(ctx.shift_dtype),
            dscale.to(scale.dtype),
            None,
        )


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gate)
        return _residual_sum(x, branch, gate)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        branch, gate = ctx.saved_tensors
        _, dbranch, partial = _residual_norm_backward(None, branch, gate, None, None, dtotal, None, 0.0)
        return dtotal, dbranch, partial.sum((1, 2)).to(gate.dtype)


@torch.library.custom_op("lamamba::gated_norm", mutates_args=())
def _gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, save_sum: bool
) -> tuple[Tensor, Tensor]:
    """The norm, and for the backward y's sum over the groups, if there are several."""
    y, z = y.contiguous(), _uniform_rows(z)
    groups = y.shape[-2]
    out, width = z.new_empty(z.shape), z.shape[-1]
    total = y.new_empty(z.shape if save_sum and groups > 1 else 0)
    num_tokens = z.numel() // width
    tiles = _Tiles.of_forward(y, num_tokens, width)
    with torch.cuda.device_of(z):
        kernels.gated_norm_kernel[tiles.grid(num_tokens)](
            *(y, z, weight, bias, out, total if len(total) else None, num_tokens, z.stride(-2), eps),
            **(tiles.options(width) | {"GROUPS": groups}),
        )
    return out, total


@_gated_norm.register_fake
def _(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, save_sum: bool
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), y.new_empty(z.shape if save_sum and y.shape[-2] > 1 else 0)


@torch.library.custom_op("lamamba::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    total: Tensor, z: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum over the groups and of z, and of weight and bias `(parts, 2, d)`, to add up."""
    total, z, dout = total.contiguous(), _uniform_rows(z), dout.contiguous()
    dtotal, dz, sums, cut = _gated_norm_gradients(total, z)
    with torch.cuda.device_of(z):
        kernels.gated_norm_bwd_kernel[(len(sums),)](
            *(total, z, weight, bias, dout, dtotal, dz, sums),
            *(cut.run, cut.part, z.stride(-2), eps),
            **(cut.tiles.options(z.shape[-1]) | {"STAGES": GATED_NORM_STAGES}),
        )
    return dtotal, dz, sums


@_gated_norm_backward.register_fake
def _(
    total: Tensor, z: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _gated_norm_gradients(total, z)[:3]


def _gated_norm_gradients(total: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, _Cut]:
    """Room for what `_gated_norm_backward` returns, and how its tokens are cut."""
    width = z.shape[-1]
    cut = _Cut.of(1, z.numel() // width, width, vector=GATED_NORM_VECTOR)
    sums = z.new_empty((cut.parts, 2, width), dtype=torch.float32)
    return total.new_empty(total.shape), z.new_empty(z.shape), sums, cut


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, total = _gated_norm(y, z, weight, bias, eps, True)
        ctx.save_for_backward(total if y.shape[-2] > 1 else y, z, weight, bias)
        ctx.eps, ctx.shape = eps, y.shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        total, z, weight, bias = ctx.saved_tensors
        dtotal, dz, partial = _gated_norm_backward(total, z, weight, bias, dout, ctx.eps)
        *tokens, _, width = ctx.shape
        dweight, dbias = partial.sum(0)
        return (
            dtotal.view(*tokens, 1, width).expand(ctx.shape),
            dz,
            dweight.to(weight.dtype),
            dbias.to(bias.dtype),
            None,
        )


@torch.library.custom_op("lamamba::resampled_norm", mutates_args=())
def _resampled_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, merged: bool) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(_resampled(x.shape, factor, merged))
    *_, columns, width = out.shape
    num_tokens = out.numel() // width
    tiles = _Tiles.of_forward(x, num_tokens, width)
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
    """`x + gate * branch`, in x's dtype, and `LN(sum) * (1 + scale) + shift`, in that of shift.

    The norm is of the sum before that is rounded to x's dtype, its gradient that of the rounded sum.

    Args:
        x: `(B, ..., d)`, B at least 1. fp32, bf16 or fp16, like all that follow.
        branch, gate: like x, and `(B, d)`; both None for x alone, which is then returned as it is.
        weight, bias: `(d,)`, or None.
        shift, scale: `(B, d)`. Slices of a larger tensor, as `gate`, are read in place.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(x=x, branch=branch, gate=gate, weight=weight, bias=bias, shift=shift, scale=scale)
    inputs = (x, branch, gate, weight, bias, shift, scale)
    if needs_gradient(*inputs):
        total_and_out = _ResidualNorm.apply(*inputs, eps)
        return (x, total_and_out) if branch is None else total_and_out
    total, out = _residual_norm(*inputs, eps)
    return x if branch is None else total, out


def residual_sum(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * branch`, in x's dtype, where no norm follows that makes the sum.

    Args:
        x: `(B, ..., d)`, B at least 1. fp32, bf16 or fp16, like all that follow.
        branch, gate: like x, and `(B, d)`.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(x=x, branch=branch, gate=gate)
    if needs_gradient(x, branch, gate):
        return _ResidualSum.apply(x, branch, gate)
    return _residual_sum(x, branch, gate)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`LN(sum of y over groups) * SiLU(z)`, like z in shape and dtype.

    The norm is of the sum in fp32, its gradient that of the sum in y's dtype.

    Args:
        y: `(..., groups, d)`, for each token of z, one at least, in their order. fp32, bf16 or fp16, like all
            that follow.
        z: `(..., d)`; half of a projection's output is read in place.
        weight, bias: `(d,)`.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(y=y, z=z, weight=weight, bias=bias)
    if needs_gradient(y, z, weight, bias):
        return _GatedNorm.apply(y, z, weight, bias, eps)
    out, _ = _gated_norm(y, z, weight, bias, eps, False)
    return out


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
