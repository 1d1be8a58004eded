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
# Of one warp and MAX_REGISTERS, so many programs run at once. If their blocks of y and u together stay in
# the L2 cache (50 MB, some of it others'), adding up directions there moves no bytes in memory.
RESIDENT_PROGRAMS = 1584
CACHED_BYTES = 40_000_000
MAX_REGISTERS = 168  # a thread; 12 warps a multiprocessor, and the tile of 32 x 64 spills 3 % of its work


def is_available(device: torch.device | str) -> bool:
    """Whether the kernels run on `device`: CUDA with triton installed, or a CPU under Triton's interpreter.

    The interpreter (`TRITON_INTERPRET=1` before triton is imported) is for tests: a small scan takes seconds.
    """
    if find_spec("triton") is None:
        return False
    from triton import JITFunction

    if isinstance(triton_kernels.selective_scan_fwd_kernel, JITFunction):
        return torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.device(device).type == "cpu"


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Steps and channels of a tile, warps of a program, and channels that a thread loads at once."""

    steps: int
    block_c: int
    num_warps: int
    vector: int

    @classmethod
    def of(
        cls, num_rows: int, path_length: int, d_inner: int, A: Tensor, dt: Tensor, backward: bool
    ) -> _Tile:
        """`num_rows`: batch rows times directions.

        The dot product wants 16 steps at least. A forward of one warp gives each thread whole columns of its
        tile (`vector` such that 32 threads span the channels): its scan is a chain of multiply-adds without
        a shuffle, and two columns share the addresses of a row. The backward also sums over channels, where
        8 threads to a row are better. Of what the registers hold, each tile takes the fewest instructions an
        element; fp32 splits the operands of its dot product in three, so it takes smaller ones. With more
        than one state a channel, the backward must cut its tiles as the forward did.
        """
        few = num_rows * -(-d_inner // 32) < FILLING_PROGRAMS
        if A.shape[2] > 1 or (few and path_length > 16):
            return cls(steps=64, block_c=32, num_warps=4, vector=8)
        if backward:
            return cls(steps=16, block_c=32, num_warps=1, vector=4)
        single = dt.dtype == torch.float32
        steps = 16 if single or path_length <= 16 else 32
        if 0 < d_inner % 64 <= 32 or (single and dt.shape[3] > 32):
            return cls(steps=steps, block_c=32, num_warps=1, vector=1)
        return cls(steps=steps, block_c=64, num_warps=1, vector=2)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How a scan is cut: its tile, and `num_programs` programs that take `merged` directions each."""

    tile: _Tile
    merged: int
    num_blocks: int
    num_tiles: int
    num_programs: int

    @classmethod
    def of(cls, u: Tensor, dt: Tensor, A: Tensor, paths: Tensor, *, backward: bool) -> _Grid:
        """A function of shapes alone: nothing is tuned in a request."""
        (directions, d_inner, _), path_length = A.shape, paths.shape[1]
        num_rows = u.shape[0] * directions
        tile = _Tile.of(num_rows, path_length, d_inner, A, dt, backward)
        num_blocks = -(-d_inner // tile.block_c)
        num_programs = num_rows * num_blocks
        merged = 1
        if not backward and tile.num_warps == 1:
            bytes_each = u.shape[1] * tile.block_c * (4 + u.element_size())
            while directions % (2 * merged) == 0:
                programs = num_programs // (2 * merged)
                resident = min(programs, RESIDENT_PROGRAMS) * bytes_each
                if programs < FILLING_PROGRAMS or resident > CACHED_BYTES:
                    break
                merged *= 2
        return cls(
            tile=tile,
            merged=merged,
            num_blocks=num_blocks,
            num_tiles=-(-path_length // tile.steps),
            num_programs=num_programs // merged,
        )

    def options(self, dt: Tensor, d_state: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        tile, rank = self.tile, dt.shape[3]
        return {
            "D_STATE": d_state,
            "STATES": 1 << (d_state - 1).bit_length(),
            "RANK": rank,
            "RANKS": max(16, 1 << (rank - 1).bit_length()),
            "DT_TOKEN": dt.stride(1),
            "DT_DIRECTION": dt.stride(2),
            "PRECISION": "tf32x3" if dt.dtype == torch.float32 else "ieee",
            "STEPS": tile.steps,
            "BLOCK_C": tile.block_c,
            "VECTOR": tile.vector,
            "LANES_ARE_CHANNELS": tile.num_warps == 1,
            "num_warps": tile.num_warps,
        }


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _per_direction(u: Tensor, groups: int, paths: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for `(batch, length, groups, d_inner)`; zeros where the paths do not visit every token."""
    batch, length, d_inner = u.shape
    allocate = u.new_empty if paths.shape[1] == length else u.new_zeros
    return allocate((batch, length, groups, d_inner), dtype=dtype)


@torch.library.custom_op("lamamba::triton_scan_forward", mutates_args=())
def _forward(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """y as `_room_for_y` says, and the states that the backward needs."""
    u, dt = _unit_stride(u), _unit_stride(dt)
    grid, d_state = _Grid.of(u, dt, A, paths, backward=False), A.shape[2]
    y = _room_for_y(u, paths, grid)
    states = _saved_states(u, paths, grid, d_state, save_states)
    arguments = (
        u,
        dt,
        dt_proj_weight.contiguous(),
        A.contiguous(),
        B,
        C,
        D.contiguous(),
        delta_bias.contiguous(),
        paths.contiguous(),
        y,
        states,
        *(u.shape[1], paths.shape[1], u.shape[2], len(paths), grid.num_blocks, grid.num_tiles),
        *(*u.stride()[:2], dt.stride(0), *B.stride(), *C.stride()),
    )
    with torch.cuda.device_of(u):
        triton_kernels.selective_scan_fwd_kernel[(grid.num_programs,)](
            *arguments,
            **grid.options(dt, d_state),
            **_register_limit(grid, dt),
            SAVE_STATES=save_states,
            MERGED=grid.merged,
            GAPS=paths.shape[1] < u.shape[1],
        )
    return y, states


@_forward.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    grid = _Grid.of(u, dt, A, paths, backward=False)
    return _room_for_y(u, paths, grid), _saved_states(u, paths, grid, A.shape[2], save_states)


def _register_limit(grid: _Grid, dt: Tensor) -> dict[str, int]:
    """More warps at once for the tiles that nearly fit, as the half precisions' do."""
    limited = grid.tile.num_warps == 1 and dt.dtype != torch.float32
    return {"maxnreg": MAX_REGISTERS} if limited else {}


def _room_for_y(u: Tensor, paths: Tensor, grid: _Grid) -> Tensor:
    """Room for `(batch, length, directions / merged, d_inner)`.

    In u's dtype where every direction has its own y, which torch then sums; fp32 where a program adds up
    several.
    """
    groups = len(paths) // grid.merged
    return _per_direction(u, groups, paths, u.dtype if grid.merged == 1 else torch.float32)


def _saved_states(u: Tensor, paths: Tensor, grid: _Grid, d_state: int, save: bool) -> Tensor:
    """The states that the backward needs: all where a channel has one, else those that start a tile."""
    if not save:
        return u.new_empty(0, dtype=torch.float32)
    if d_state == 1:
        dtype = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
        return u.new_empty((u.shape[0], *paths.shape, u.shape[2]), dtype=dtype)
    shape = (u.shape[0], len(paths), grid.num_blocks, grid.num_tiles, d_state, grid.tile.block_c)
    return u.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("lamamba::triton_scan_backward", mutates_args=())
def _backward(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partial gradients of u, delta (before bias), A, B, C, D, delta_bias.

    Shaped as `selective_scan_bwd_kernel` says. Left to add: u's over directions, A's, D's and delta_bias's
    over batch rows, B's and C's over blocks.
    """
    u, dt, dy = _unit_stride(u), _unit_stride(dt), dy.contiguous()
    grid, d_state = _Grid.of(u, dt, A, paths, backward=True), A.shape[2]
    gradients = _partial_gradients(u, dt, A, paths, grid)
    arguments = (
        u,
        dt,
        dt_proj_weight.contiguous(),
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
        *(*u.stride()[:2], dt.stride(0), *B.stride(), *C.stride()),
    )
    with torch.cuda.device_of(u):
        triton_kernels.selective_scan_bwd_kernel[(grid.num_programs,)](
            *arguments, **grid.options(dt, d_state)
        )
    return gradients


@_backward.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _partial_gradients(u, dt, A, paths, _Grid.of(u, dt, A, paths, backward=True))


def _partial_gradients(
    u: Tensor, dt: Tensor, A: Tensor, paths: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, length, d_inner), (directions, path_length), d_state = u.shape, paths.shape, A.shape[2]
    allocate = u.new_empty if path_length == length else u.new_zeros
    per_token = (grid.num_blocks, batch, length, directions, d_state)
    per_channel = (batch, directions, d_inner)
    return (
        _per_direction(u, directions, paths, u.dtype),
        allocate((directions, batch, length, d_inner), dtype=dt.dtype),
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
        return _sum_of_groups(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, dt_proj_weight, A, B, C, D, delta_bias, paths, states = ctx.saved_tensors
        partial = _backward(u, dt, dt_proj_weight, A, B, C, D, delta_bias, paths, states, grad_y)
        du, ddelta, dA, dB, dC, dD, dbias = partial
        ddelta = ddelta.flatten(1, 2)  # (directions, batch * length, d_inner): no copy before either product
        ddt = torch.bmm(ddelta, dt_proj_weight).unflatten(1, u.shape[:2]).permute(1, 2, 0, 3)
        dweight = torch.bmm(ddelta.transpose(1, 2), dt.permute(2, 0, 1, 3).flatten(1, 2))
        return (
            du.sum(2, dtype=torch.float32).to(u.dtype),
            ddt.to(dt.dtype),
            dweight.to(dt_proj_weight.dtype),
            dA.sum(0).transpose(1, 2).to(A.dtype),
            dB.sum(0).to(B.dtype),
            dC.sum(0).to(C.dtype),
            dD.sum(0).to(D.dtype),
            dbias.sum(0).to(delta_bias.dtype),
            None,
        )


def _sum_of_groups(y: Tensor) -> Tensor:
    """`_forward`'s y, `(batch, length, d_inner)` in fp32."""
    return y.squeeze(2).float() if y.shape[2] == 1 else y.sum(2, dtype=torch.float32)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
) -> Tensor:
    """Same arguments and result as `reference.selective_scan`, for fp32, bf16 and fp16 inputs; fp32 inside.

    The step sizes are products of dt and of the weight in dt's dtype, summed in fp32 and never rounded. The
    sum over directions is fp32 too: a program that takes several adds to fp32 numbers; where each has its
    own, their y are stored in u's dtype before torch sums them, as their gradients of u are. A path as long
    as the sequence is taken to be a permutation, and no path visits a token twice.

    Raises ValueError for an input dtype that the kernels do not read, and for more tokens than they count.
    """
    for name, tensor in (("u", u), ("dt", dt), ("B", B), ("C", C)):
        if tensor.dtype not in INPUT_DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} given; float32, bfloat16 or float16 is accepted")
    for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: {tensor.dtype} given; float32 is accepted")
    widest = max(A.shape[0] * A.shape[1], *(tensor.stride(1) for tensor in (u, dt, B, C)))
    if u.shape[1] * widest >= 2**31:
        raise ValueError(
            f"length: {u.shape[1]} given; the kernels accept {(2**31 - 1) // widest} at this width"
        )
    inputs = (u, dt, dt_proj_weight.to(dt.dtype), A, B, C, D, delta_bias, paths)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _SelectiveScan.apply(*inputs)
    y, _ = _forward(*inputs, save_states=False)
    return _sum_of_groups(y)
