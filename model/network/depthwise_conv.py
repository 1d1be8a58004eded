"""The depthwise 3x3 convolution and its SiLU through the Triton kernels of `depthwise_conv_kernels.py`:
launch, operators, gradient.

What `vssm.VisualStateSpace` does to u between its input projection and the scan, on channels-last tensors
throughout. The module's own path is the readable reference, and what runs where these kernels do not. They
run where the Triton scan does (`scan.triton_scan.is_available`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.network import depthwise_conv_kernels as kernels
from model.network.triton_jit import check_dtypes, needs_gradient

COLUMNS = 4  # of a strip
NUM_WARPS = 4
TILE = NUM_WARPS * 32 * 4  # strips times channels of a program; 4 channels a thread
MAX_BLOCK_C = 128  # a warp's row of a tile: 256 bytes of bf16 side by side
MAX_ROWS = 64  # of a strip
# Programs at a time on an H100's 132 multiprocessors: compiled, a thread of the forward takes 128 registers,
# one of the backward up to 255.
FORWARD_PROGRAMS = 4 * 132
BACKWARD_PROGRAMS = 2 * 132


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """How a convolution is cut: strips of `rows` rows, `groups` times `blocks` programs."""

    num_strips: int
    rows: int
    groups: int
    """Programs of a block of channels."""
    blocks: int
    """Blocks of channels."""
    shape: dict[str, int]
    """Compile-time arguments: all that does not change with the batch and the size of the grid."""

    @classmethod
    def of(cls, u: Tensor, *, backward: bool) -> _Launch:
        """A function of shapes alone: nothing is tuned in a request."""
        batch, height, width, channels = u.shape
        block_c = min(MAX_BLOCK_C, _power_of_two(channels))
        strips = TILE // block_c
        blocks = -(-channels // block_c)
        programs = BACKWARD_PROGRAMS if backward else FORWARD_PROGRAMS

        def groups(rows: int) -> int:
            return -(-batch * -(-height // rows) * -(-width // COLUMNS) // strips)

        def steps(rows: int) -> int:
            """Rows that the longest row of programs loads, those beside its strips included."""
            return -(-groups(rows) * blocks // programs) * (rows + 2)

        longest = min(MAX_ROWS, _power_of_two(height))
        rows = min((longest >> halvings for halvings in range(longest.bit_length())), key=steps)
        groups_each = -(-groups(rows) // max(1, programs // blocks)) if backward else 1
        return cls(
            num_strips=batch * -(-height // rows) * -(-width // COLUMNS),
            rows=rows,
            groups=-(-groups(rows) // groups_each),
            blocks=blocks,
            shape={"D": channels, "COLUMNS": COLUMNS, "STRIPS": strips, "BLOCK_C": block_c},
        )

    @property
    def grid(self) -> tuple[int]:
        return (self.groups * self.blocks,)

    def size(self, u: Tensor) -> tuple[int, int, int, int]:
        """The kernels' arguments that change with the batch and the grid."""
        return self.num_strips, u.shape[1], u.shape[2], self.rows

    @property
    def options(self) -> dict[str, int]:
        # One stage: a kernel fetches its next row itself, into registers.
        return self.shape | {"num_warps": NUM_WARPS, "num_stages": 1}


def _power_of_two(size: int) -> int:
    """The power of two from `size` on."""
    return 1 << (size - 1).bit_length()


def _in_place(u: Tensor) -> tuple[Tensor, int]:
    """u, and how far apart its tokens lie; a copy of u where that is not one distance throughout.

    A slice of the channels of a contiguous tensor is taken as it is.
    """
    axes = [(size, stride) for size, stride in zip(u.shape[:3], u.stride()[:3], strict=True) if size > 1]
    token = axes[-1][1] if axes else u.shape[3]
    even, expected = u.stride(3) == 1, token
    for size, stride in reversed(axes):
        even, expected = even and stride == expected, expected * size
    return (u, token) if even else (u.contiguous(), u.shape[3])


@torch.library.custom_op("lamamba::conv3x3_silu_forward", mutates_args=())
def _forward(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    u, token = _in_place(u)
    weight = weight.contiguous()
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    launch = _Launch.of(u, backward=False)
    with torch.cuda.device_of(u):
        kernels.conv3x3_kernel[launch.grid](
            *(u, weight, weight if bias is None else bias.contiguous(), out, *launch.size(u)),
            **launch.options,
            TOKEN=token,
            HAS_BIAS=bias is not None,
            SILU=True,
            TURNED=False,
        )
    return out


@_forward.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("lamamba::conv3x3_silu_backward", mutates_args=())
def _backward(u: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of u; those of the weight, (9, d), and of the bias, if any, (1, d), as one fp32 tensor."""
    (u, token), weight, dout = _in_place(u), weight.contiguous(), dout.contiguous()
    has_bias, channels = bias is not None, u.shape[3]
    dpre, du = torch.empty_like(dout), torch.empty_like(dout)
    launch = _Launch.of(u, backward=True)
    sums = u.new_empty((launch.groups, 9 + has_bias, channels), dtype=torch.float32)
    with torch.cuda.device_of(u):
        kernels.conv3x3_silu_bwd_kernel[launch.grid](
            *(u, weight, weight if bias is None else bias.contiguous(), dout, dpre, sums, *launch.size(u)),
            **launch.options,
            TOKEN=token,
            HAS_BIAS=has_bias,
        )
        launch = _Launch.of(u, backward=False)
        kernels.conv3x3_kernel[launch.grid](
            *(dpre, weight, weight, du, *launch.size(u)),
            **launch.options,
            TOKEN=channels,
            HAS_BIAS=False,
            SILU=False,
            TURNED=True,
        )
    return du, sums.sum(0)


@_backward.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor) -> tuple[Tensor, Tensor]:
    sums = u.new_empty((9 + (bias is not None), u.shape[3]), dtype=torch.float32)
    return torch.empty_like(u, memory_format=torch.contiguous_format), sums


class _Conv3x3SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, weight, bias)
        return _forward(u, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias = ctx.saved_tensors
        du, sums = _backward(u, weight, bias, dout)
        dweight = sums[:9].t().reshape(weight.shape).to(weight.dtype)
        return du, dweight, None if bias is None else sums[9].to(bias.dtype)


def conv3x3_silu(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a depthwise 3x3 convolution over zero padding, `(B, H, W, d) -> (B, H, W, d)`; sums in fp32.

    Args:
        u: fp32, bf16 or fp16; read in place if it is a slice of the channels of a contiguous tensor.
        weight: `(d, 1, 3, 3)`, as `nn.Conv2d` has it; same dtypes.
        bias: `(d,)` or None; same dtypes.

    Raises ValueError for a dtype that the kernels do not read.
    """
    check_dtypes(u=u, weight=weight, bias=bias)
    if needs_gradient(u, weight, bias):
        return _Conv3x3SiLU.apply(u, weight, bias)
    return _forward(u, weight, bias)
