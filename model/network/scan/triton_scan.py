"""Selective scan through the Triton kernels of `triton_kernels.py`: their launch, operators and gradient.

The kernels read the tokens in place through the paths and write y for each direction; the sum over directions
is left to whoever reads y, outside the operators: to a kernel, or to torch.compile, which fuses it with the
layer norm that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.network.scan import triton_kernels
from model.network.triton_jit import check_dtypes, needs_gradient

# Programs of one warp that fill an H100: 8 on each of 132 multiprocessors, by their registers.
FILLING_PROGRAMS = 8 * 132
# With so few programs (or fewer), cutting paths pays for the half as much work that it adds.
FEW_PROGRAMS = FILLING_PROGRAMS // 3
CHUNK_TILES = 4  # of a chunk at least
MAX_CHUNKS = 32
BACKWARD_STAGES = 2  # tiles of the backward that are under way


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
    def of(cls, num_rows: int, d_inner: int, d_state: int, rank: int) -> _Tile:
        """The forward's. `num_rows`: batch rows times directions.

        The dot product wants 16 steps at least. One warp gives each thread whole columns of its tile
        (`vector` such that 32 threads span the channels): its scan is a chain of multiply-adds without a
        shuffle, and the columns share the addresses of a row. Wide tiles share more, where they are many
        enough and their weights do not take the shared memory of other programs.
        """
        if d_state > 1:
            return cls(steps=64, block_c=32, num_warps=4, vector=8)
        wide = d_inner % 128 == 0 and rank <= 48 and num_rows * d_inner // 128 >= 2 * FILLING_PROGRAMS
        block_c = 128 if wide else 64
        return cls(steps=16, block_c=block_c, num_warps=1, vector=block_c // 32)

    @classmethod
    def of_backward(cls, num_rows: int, path_length: int, d_inner: int, d_state: int) -> _Tile:
        """The backward also sums over channels, where 8 threads to a row are better; with few programs, one
        takes more warps and longer tiles. Where a channel has more than one state, it must cut its tiles as
        the forward did.
        """
        few = num_rows * -(-d_inner // 32) < FILLING_PROGRAMS
        if d_state > 1 or (few and path_length > 16):
            return cls(steps=64, block_c=32, num_warps=4, vector=8)
        return cls(steps=16, block_c=32, num_warps=1, vector=4)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How a scan is cut: a function of shapes alone, so that nothing is tuned in a request."""

    tile: _Tile
    num_blocks: int
    num_tiles: int
    """Of a chunk."""
    chunks: int
    num_programs: int
    """That take a chunk each; one less of each path only finds the ends of chunks."""

    @classmethod
    def of(cls, u: Tensor, dt: Tensor, A_log: Tensor, paths: Tensor, *, backward: bool = False) -> _Grid:
        (batch, _, d_inner), (directions, path_length), d_state = u.shape, paths.shape, A_log.shape[2]
        num_rows = batch * directions
        if backward:
            tile = _Tile.of_backward(num_rows, path_length, d_inner, d_state)
        else:
            tile = _Tile.of(num_rows, d_inner, d_state, dt.shape[3])
        num_blocks, num_tiles = -(-d_inner // tile.block_c), -(-path_length // tile.steps)
        chunks = 1
        if not backward and d_state == 1 and num_rows * num_blocks <= FEW_PROGRAMS:
            while (
                chunks < MAX_CHUNKS
                and num_rows * num_blocks * chunks < FILLING_PROGRAMS
                and num_tiles >= 2 * chunks * CHUNK_TILES
            ):
                chunks *= 2
        return cls(
            tile=tile,
            num_blocks=num_blocks,
            num_tiles=-(-num_tiles // chunks),
            chunks=chunks,
            num_programs=num_rows * num_blocks * chunks,
        )

    def options(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, d_state: int) -> dict[str, Any]:
        """The compile-time arguments of both kernels."""
        tile, rank = self.tile, dt.shape[3]
        # Of the power of two that spans it, a rank such as 80 would leave a third empty: 64 + 16 is spanned.
        ranks = max(16, 1 << (rank - 1).bit_length())
        rest = max(0, rank - ranks // 2)
        rest = max(16, 1 << (rest - 1).bit_length()) if rest else 0
        if ranks // 2 < 16 or ranks // 2 + rest >= ranks:
            rest = 0
        return {
            "D_STATE": d_state,
            "STATES": 1 << (d_state - 1).bit_length(),
            "RANK": rank,
            "RANKS": ranks // 2 if rest else ranks,
            "REST": rest,
            "U_TOKEN": u.stride(1),
            "B_TOKEN": B.stride(1),
            "C_TOKEN": C.stride(1),
            "DT_TOKEN": dt.stride(1),
            "DT_DIRECTION": dt.stride(2),
            "PRECISION": "tf32x3" if dt.dtype == torch.float32 else "ieee",
            "EXACT": dt.dtype == torch.float32,
            "STEPS": tile.steps,
            "BLOCK_C": tile.block_c,
            "VECTOR": tile.vector,
            "LANES_ARE_CHANNELS": tile.num_warps == 1,
            "num_warps": tile.num_warps,
        }


def _are_pairs(B: Tensor, C: Tensor) -> bool:
    """Whether each number of B and the one of C at the same place share an aligned word of 32 bits."""
    return (
        B.element_size() == 2
        and C.data_ptr() == B.data_ptr() + 2
        and B.data_ptr() % 4 == 0
        and B.stride() == C.stride()
        and all(stride % 2 == 0 for stride in B.stride()[:3])
    )


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _per_direction(u: Tensor, paths: Tensor) -> Tensor:
    """Room for `(batch, length, directions, d_inner)`; zeros where the paths do not visit every token."""
    batch, length, d_inner = u.shape
    allocate = u.new_empty if paths.shape[1] == length else u.new_zeros
    return allocate((batch, length, len(paths), d_inner))


@torch.library.custom_op("lamamba::triton_scan_forward", mutates_args=())
def _forward(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """y `(batch, length, directions, d_inner)`, and the states that the backward needs."""
    u, dt, paths = _unit_stride(u), _unit_stride(dt), paths.contiguous()
    dt_proj_weight, A_log, D, delta_bias = (
        tensor.contiguous() for tensor in (dt_proj_weight, A_log, D, delta_bias)
    )
    (batch, length, d_inner), (directions, path_length), d_state = u.shape, paths.shape, A_log.shape[2]
    grid = _Grid.of(u, dt, A_log, paths)
    y = _per_direction(u, paths)
    states = _saved_states(u, paths, grid, d_state, save_states)
    per_chunk = (batch, directions, grid.chunks, d_inner) if grid.chunks > 1 else (0,)
    decays, ends = (u.new_empty(per_chunk, dtype=torch.float32) for _ in range(2))
    long = path_length >= 1024
    options = grid.options(u, dt, B, C, d_state) | {
        "Y_TOKEN": y.stride(1),
        # Such loads are made ahead like the others, but wait for the path: that pays where tiles are wide.
        "PAIRED": grid.tile.block_c == 128 and _are_pairs(B, C),
        "EVEN": path_length % (grid.chunks * grid.tile.steps) == 0 and d_inner % grid.tile.block_c == 0,
        "CHUNKS": grid.chunks,
        "STAGES": 1 if d_state > 1 else 3 if long else 2,
    }

    def launch(num_chunks: int, **flags: bool) -> None:
        triton_kernels.selective_scan_fwd_kernel[(grid.num_programs // grid.chunks * num_chunks,)](
            *(u, dt, dt_proj_weight, A_log, B, C, D, delta_bias, paths, y, states, decays, ends),
            *(length, path_length, d_inner, directions, grid.num_blocks, num_chunks, grid.num_tiles),
            *(u.stride(0), dt.stride(0), B.stride(0), *B.stride()[2:], C.stride(0), *C.stride()[2:]),
            **options,
            **flags,
        )

    with torch.cuda.device_of(u):
        if grid.chunks > 1:
            launch(grid.chunks - 1, ENDS_ONLY=True, SAVE_STATES=False)
        launch(grid.chunks, ENDS_ONLY=False, SAVE_STATES=save_states)
    return y, states


@_forward.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    grid = _Grid.of(u, dt, A_log, paths)
    return _per_direction(u, paths), _saved_states(u, paths, grid, A_log.shape[2], save_states)


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
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partial gradients of u, delta (before bias), A_log, B, C, D, delta_bias; dy: of any direction's y.

    Shaped as `selective_scan_bwd_kernel` says. Left to add: u's over directions, those of A_log, D and
    delta_bias over batch rows, those of B and C over blocks.
    """
    u, dt, dy = _unit_stride(u), _unit_stride(dt), dy.contiguous()
    grid, d_state = _Grid.of(u, dt, A_log, paths, backward=True), A_log.shape[2]
    gradients = _partial_gradients(u, dt, A_log, paths, grid)
    arguments = (
        u,
        dt,
        dt_proj_weight.contiguous(),
        A_log.contiguous(),
        B,
        C,
        D.contiguous(),
        delta_bias.contiguous(),
        paths.contiguous(),
        states,
        dy,
        *gradients,
        *(*u.shape[:2], paths.shape[1], u.shape[2], len(paths), grid.num_blocks, grid.num_tiles),
        *(u.stride(0), dt.stride(0), B.stride(0), *B.stride()[2:], C.stride(0), *C.stride()[2:]),
    )
    options = grid.options(u, dt, B, C, d_state) | {"STAGES": BACKWARD_STAGES if d_state == 1 else 1}
    with torch.cuda.device_of(u):
        triton_kernels.selective_scan_bwd_kernel[(grid.num_programs,)](*arguments, **options)
    return gradients


@_backward.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _partial_gradients(u, dt, A_log, paths, _Grid.of(u, dt, A_log, paths, backward=True))


def _partial_gradients(
    u: Tensor, dt: Tensor, A_log: Tensor, paths: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, length, d_inner), (directions, path_length), d_state = u.shape, paths.shape, A_log.shape[2]
    allocate = u.new_empty if path_length == length else u.new_zeros
    per_token = (grid.num_blocks, batch, length, directions, d_state)
    per_channel = (batch, directions, d_inner)
    return (
        _per_direction(u, paths),
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
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, dt_proj_weight, A_log, B, C, D, delta_bias, paths, states = ctx.saved_tensors
        dy = grad_y[:, :, 0]  # as of all directions, since their sum is what is read
        partial = _backward(u, dt, dt_proj_weight, A_log, B, C, D, delta_bias, paths, states, dy)
        du, ddelta, dA_log, dB, dC, dD, dbias = partial
        ddelta = ddelta.flatten(1, 2)  # (directions, batch * length, d_inner): no copy before either product
        ddt = torch.bmm(ddelta, dt_proj_weight).unflatten(1, u.shape[:2]).permute(1, 2, 0, 3)
        dweight = torch.bmm(ddelta.transpose(1, 2), dt.permute(2, 0, 1, 3).flatten(1, 2))
        return (
            du.sum(2, dtype=torch.float32).to(u.dtype),
            ddt.to(dt.dtype),
            dweight.to(dt_proj_weight.dtype),
            dA_log.sum(0).transpose(1, 2).to(A_log.dtype),
            dB.sum(0).to(B.dtype),
            dC.sum(0).to(C.dtype),
            dD.sum(0).to(D.dtype),
            dbias.sum(0).to(delta_bias.dtype),
            None,
        )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
) -> Tensor:
    """Same arguments and result as `reference.selective_scan`, for fp32, bf16 and fp16 inputs; fp32 inside.

    The step sizes are products of dt and of the weight in dt's dtype, summed in fp32 and never rounded. Each
    direction's y is stored in u's dtype, as its gradient of u is. A path as long as the sequence is taken to
    be a permutation, and no path visits a token twice. Gradients are those of the directions' sum.

    Raises ValueError for an input dtype that the kernels do not read, and for more tokens than they count.
    """
    check_dtypes(u=u, dt=dt, A_log=A_log, B=B, C=C, D=D, delta_bias=delta_bias)
    widest = max(A_log.shape[0] * A_log.shape[1], *(tensor.stride(1) for tensor in (u, dt, B, C)))
    if u.shape[1] * widest >= 2**31:
        raise ValueError(
            f"length: {u.shape[1]} given; the kernels accept {(2**31 - 1) // widest} at this width"
        )
    inputs = (u, dt, dt_proj_weight.to(dt.dtype), A_log, B, C, D, delta_bias, paths)
    if needs_gradient(*inputs):
        return _SelectiveScan.apply(*inputs)
    y, _ = _forward(*inputs, save_states=False)
    return y
