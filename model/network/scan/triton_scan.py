"""Selective scan through the Triton kernels of `triton_kernels.py`: their launch, operators and gradient.

The kernels read the tokens in place through the paths and write y for each direction; the sum over directions
is left to torch, outside the operators, so that torch.compile fuses it with the layer norm that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.network.scan import triton_kernels

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Programs that fill an H100 (8 of one warp on each of 132 multiprocessors). With fewer, a program takes more
# warps and longer tiles: more steps of each sequence at once.
FILLING_PROGRAMS = 1056


def is_available(device: torch.device | str) -> bool:
    """Whether the kernels run on `device`: CUDA with triton installed, or a CPU under Triton's interpreter.

    The interpreter (`TRITON_INTERPRET=1` before triton is imported) is for tests: a small scan takes seconds.
    """
    if find_spec("triton") is None:
        return False
    from triton import JITFunction

    if isinstance(triton_kernels.fwd_kernel, JITFunction):
        return torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.device(device).type == "cpu"


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How a scan is cut: tiles of `steps` x `block_c`, and `num_programs` programs of `num_warps` warps."""

    steps: int
    block_c: int
    num_warps: int
    num_blocks: int
    num_tiles: int
    num_programs: int

    @classmethod
    def of(cls, u: Tensor, A: Tensor, paths: Tensor) -> _Grid:
        """A function of shapes alone, so equal in forward and backward; nothing is tuned in a request."""
        (directions, d_inner, d_state), path_length = A.shape, paths.shape[1]
        block_c = 32
        num_blocks = -(-d_inner // block_c)
        num_programs = u.shape[0] * directions * num_blocks
        few = num_programs < FILLING_PROGRAMS
        steps, num_warps = (64, 4) if d_state > 1 or (few and path_length > 16) else (16, 1)
        return cls(
            steps=steps,
            block_c=block_c,
            num_warps=num_warps,
            num_blocks=num_blocks,
            num_tiles=-(-path_length // steps),
            num_programs=num_programs,
        )

    def options(self, d_state: int) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        return {
            "D_STATE": d_state,
            "STATES": 1 << (d_state - 1).bit_length(),
            "STEPS": self.steps,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
        }


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _per_direction(u: Tensor, paths: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for `(batch, length, directions, d_inner)`; zeros where the paths do not visit every token."""
    batch, length, d_inner = u.shape
    directions, path_length = paths.shape
    allocate = u.new_empty if path_length == length else u.new_zeros
    return allocate((batch, length, directions, d_inner), dtype=dtype)


@torch.library.custom_op("lamamba::triton_scan_forward", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """Each direction's y `(batch, length, directions, d_inner)`, and the state at the start of every tile."""
    u, delta = _unit_stride(u), _unit_stride(delta)
    grid, d_state = _Grid.of(u, A, paths), A.shape[2]
    y = _per_direction(u, paths, u.dtype)
    states = u.new_empty(_states_shape(grid, d_state, save_states), dtype=torch.float32)
    arguments = (
        u,
        delta,
        A.contiguous(),
        B,
        C,
        D.contiguous(),
        delta_bias.contiguous(),
        paths.contiguous(),
        y,
        states,
        *(u.shape[1], paths.shape[1], u.shape[2], len(paths), grid.num_blocks, grid.num_tiles),
        *(*u.stride()[:2], *delta.stride()[:3], *B.stride(), *C.stride()),
    )
    with torch.cuda.device_of(u):
        triton_kernels.fwd_kernel[(grid.num_programs,)](
            *arguments, **grid.options(d_state), SAVE_STATES=save_states
        )
    return y, states


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    states_shape = _states_shape(_Grid.of(u, A, paths), A.shape[2], save_states)
    return _per_direction(u, paths, u.dtype), u.new_empty(states_shape, dtype=torch.float32)


def _states_shape(grid: _Grid, d_state: int, save_states: bool) -> tuple[int, int, int, int]:
    return (grid.num_programs if save_states else 0, grid.num_tiles, d_state, grid.block_c)


@torch.library.custom_op("lamamba::triton_scan_backward", mutates_args=())
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partial gradients of u, delta, A, B, C, D, delta_bias, shaped as `bwd_kernel` says.

    Left to add: u's over directions, A's, D's and delta_bias's over batch rows, B's and C's over blocks.
    """
    u, delta, dy = _unit_stride(u), _unit_stride(delta), dy.contiguous()
    grid, d_state = _Grid.of(u, A, paths), A.shape[2]
    gradients = _partial_gradients(u, delta, A, paths, grid)
    arguments = (
        u,
        delta,
        A.contiguous(),
        B,
        C,
        D.contiguous(),
        delta_bias.contiguous(),
        paths.contiguous(),
        states,
        dy,
        *gradients,
        *(*u.shape[:2], paths.shape[1], u.shape[2], len(paths), grid.num_blocks, grid.num_tiles),
        *(*u.stride()[:2], *delta.stride()[:3], *B.stride(), *C.stride()),
    )
    with torch.cuda.device_of(u):
        triton_kernels.bwd_kernel[(grid.num_programs,)](*arguments, **grid.options(d_state))
    return gradients


@_backward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _partial_gradients(u, delta, A, paths, _Grid.of(u, A, paths))


def _partial_gradients(
    u: Tensor, delta: Tensor, A: Tensor, paths: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, length, d_inner), (directions, path_length), d_state = u.shape, paths.shape, A.shape[2]
    allocate = u.new_empty if path_length == length else u.new_zeros
    per_token = (grid.num_blocks, batch, length, directions, d_state)
    per_channel = (batch, directions, d_inner)
    return (
        _per_direction(u, paths, u.dtype),
        _per_direction(u, paths, delta.dtype),
        u.new_empty((batch, directions, d_state, d_inner), dtype=torch.float32),
        allocate(per_token, dtype=torch.float32),
        allocate(per_token, dtype=torch.float32),
        u.new_empty(per_channel, dtype=torch.float32),
        u.new_empty(per_channel, dtype=torch.float32),
    )


class _SelectiveScan(torch.autograd.Function):
    """The two kernels and the sums around them, which stay visible to torch.compile."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y, states = _forward(*inputs, save_states=True)
        ctx.save_for_backward(*inputs, states)
        return y.sum(2, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, paths, states = ctx.saved_tensors
        partial = _backward(u, delta, A, B, C, D, delta_bias, paths, states, grad_y)
        du, ddelta, dA, dB, dC, dD, dbias = partial
        return (
            du.sum(2, dtype=torch.float32).to(u.dtype),
            ddelta,
            dA.sum(0).transpose(1, 2).to(A.dtype),
            dB.sum(0).to(B.dtype),
            dC.sum(0).to(C.dtype),
            dD.sum(0).to(D.dtype),
            dbias.sum(0).to(delta_bias.dtype),
            None,
        )


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
) -> Tensor:
    """Same arguments and result as `reference.selective_scan`, for fp32, bf16 and fp16 inputs; fp32 inside.

    Each direction's y and its gradient of u are stored in u's dtype before the sum over directions, in fp32.
    A path as long as the sequence is taken to be a permutation.

    Raises ValueError for an input dtype that the kernels do not read.
    """
    for name, tensor in (("u", u), ("delta", delta), ("B", B), ("C", C)):
        if tensor.dtype not in INPUT_DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} given; float32, bfloat16 or float16 is accepted")
    for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: {tensor.dtype} given; float32 is accepted")
    inputs = (u, delta, A, B, C, D, delta_bias, paths)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _SelectiveScan.apply(*inputs)
    y, _ = _forward(*inputs, save_states=False)
    return y.sum(2, dtype=torch.float32)
