"""The selective scan's Triton kernels, forward and backward; `triton_scan.py` launches them.

Recurrence, per batch row, direction and channel, over the steps l of the path (legend in `reference.py`):

    dt = softplus(delta + delta_bias),   h <- exp(dt A) h + dt B u,   y = sum_n C[n] h[n] + D u

Grid: one program for each (batch row, block of channels, direction), directions fastest, so that the programs
which share a block of u run together and find it in the L2 cache. A program walks its path in tiles of STEPS
x BLOCK_C: it loads the path indices of the tile, then u, delta, B and C through them (BLOCK_C channels of a
token are contiguous), and solves the tile with an associative scan over its steps. Two steps compose to one,

    (a_1, b_1) then (a_2, b_2) = (a_1 a_2, a_2 b_1 + b_2),   a in (0, 1],

where products may underflow to 0 and never overflow; the state at the end of a tile enters the next. All
arithmetic is fp32, whatever the tensors are stored in.

Backward: with g_l = dL/dh_l in all, g_l = C_l dy_l + a_{l+1} g_{l+1}. Tiles are taken last to first; each
recomputes its states from the state at its start, which the forward stored (1/STEPS of a full set of states),
and runs the scan for g in reverse. Sums over batch rows (A, D, delta_bias) and over blocks of channels (B, C)
are written as partial sums for torch to add; nothing is accumulated atomically, so results do not vary
between runs.

Bytes moved per token and direction, in rows of d_inner: forward delta and y (three directions of four find u
in the L2 cache), backward delta, ddelta and du (u and dy as before). A scan that wants `(batch, channels,
length)` moves as much, and before and after it gathers u and delta and scatters y: about three times the
bytes in all.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit = triton.jit
else:  # a torch for CPUs comes without triton: `triton_scan.is_available` says so, and nothing here is called

    def jit(function: Callable[..., Any]) -> Any:
        """Leaves a kernel as it is, so that this module can be imported all the same."""
        return function


# A kernel's parameters are Triton's (pointers, integers, tiles): they have no Python type to annotate.


@jit
def _compose(a_1, b_1, a_2, b_2):  # type: ignore[no-untyped-def]  # kernel
    return a_1 * a_2, a_2 * b_1 + b_2


@jit
def _compose_reversed(a_1, p_1, g_1, a_2, p_2, g_2):  # type: ignore[no-untyped-def]  # kernel
    """Segment 1 comes after 2 on the path: g = g_2 + p_2 a_1 (g_1 + p_1 g_behind), a the first decay."""
    through = p_2 * a_1
    return a_2, through * p_1, through * g_1 + g_2


@jit
def _softplus(x):  # type: ignore[no-untyped-def]  # kernel
    """softplus(x) and its derivative, both to fp32 precision: log1p(z) = 2 atanh(s), s = z / (2 + z) <= 1/3.

    log(1 + z) would lose the small steps (x about -7) that Mamba starts from; the series ends below 2**-25.
    """
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    q = s * s
    series = 1.0 / 11 + q * (1.0 / 13)
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    log1p = 2.0 * s * (1.0 + q * series)
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0.0, 1.0, z) / (1.0 + z)


@jit
def _row(x, i):  # type: ignore[no-untyped-def]  # kernel
    """Row `i` of the tile `x`."""
    rows = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(rows[:, None] == i, x, 0.0), axis=0)


@jit
def _state(states, n, D_STATE: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """State n of `(d_state, channels)`, which is `(channels,)` where d_state is 1."""
    if D_STATE == 1:
        return states
    else:
        return _row(states, n)


@jit
def _with_state(states, n, state, D_STATE: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    if D_STATE == 1:
        return state
    else:
        rows = tl.arange(0, states.shape[0])
        return tl.where(rows[:, None] == n, state[None, :], states)


@jit
def fwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    paths_ptr,
    y_ptr,  # (batch, length, directions, d_inner)
    states_ptr,  # (programs, tiles, d_state, BLOCK_C)
    length,
    path_length,
    d_inner,
    directions,
    num_blocks,
    num_tiles,
    u_batch,
    u_token,
    delta_batch,
    delta_token,
    delta_direction,
    B_batch,
    B_token,
    B_direction,
    B_state,
    C_batch,
    C_token,
    C_direction,
    C_state,
    D_STATE: tl.constexpr,
    STATES: tl.constexpr,  # the power of two from D_STATE on
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SAVE_STATES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    direction = program % directions
    block = (program // directions) % num_blocks
    batch = program // (directions * num_blocks)

    lane = tl.arange(0, BLOCK_C)
    channel = block * BLOCK_C + lane
    in_channels = channel < d_inner
    bias = tl.load(bias_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
    D = tl.load(D_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
    if D_STATE == 1:
        A = tl.load(A_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
        states = tl.zeros((BLOCK_C,), tl.float32)
    else:
        n_index = tl.arange(0, STATES)[:, None]
        A_mask = in_channels[None, :] & (n_index < D_STATE)
        A_offsets = (direction * d_inner + channel[None, :]) * D_STATE + n_index
        A = tl.load(A_ptr + A_offsets, mask=A_mask, other=0.0)
        states = tl.zeros((STATES, BLOCK_C), tl.float32)
    A *= 1.4426950408889634  # exp(dt A) = exp2(dt A log2(e))

    u_ptr += batch * u_batch
    delta_ptr += batch * delta_batch + direction * delta_direction
    B_ptr += batch * B_batch + direction * B_direction
    C_ptr += batch * C_batch + direction * C_direction
    y_ptr += (batch * length * directions + direction) * d_inner
    states_ptr += program * num_tiles * D_STATE * BLOCK_C

    for tile in range(num_tiles):
        step = tile * STEPS + tl.arange(0, STEPS)
        in_path = step < path_length
        token = tl.load(paths_ptr + direction * path_length + step, mask=in_path, other=0)
        mask = in_path[:, None] & in_channels[None, :]
        u = tl.load(u_ptr + token[:, None] * u_token + channel[None, :], mask=mask, other=0.0)
        u = u.to(tl.float32)
        delta = tl.load(delta_ptr + token[:, None] * delta_token + channel[None, :], mask=mask, other=0.0)
        dt, _ = _softplus(delta.to(tl.float32) + bias[None, :])
        dt = tl.where(in_path[:, None], dt, 0.0)  # beyond the end: a = 1, b = 0, the state stays
        drive = dt * u
        y = D[None, :] * u
        for n in range(D_STATE):
            B = tl.load(B_ptr + token * B_token + n * B_state, mask=in_path, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + token * C_token + n * C_state, mask=in_path, other=0.0).to(tl.float32)
            start = _state(states, n, D_STATE)
            if SAVE_STATES:
                tl.store(states_ptr + (tile * D_STATE + n) * BLOCK_C + lane, start)
            a = tl.exp2(dt * _state(A, n, D_STATE)[None, :])
            decay, h = tl.associative_scan((a, drive * B[:, None]), 0, _compose)
            h += decay * start[None, :]
            y += C[:, None] * h
            states = _with_state(states, n, _row(h, STEPS - 1), D_STATE)
        y_offsets = token[:, None] * (directions * d_inner) + channel[None, :]
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    paths_ptr,
    states_ptr,  # (programs, tiles, d_state, BLOCK_C)
    dy_ptr,  # (batch, length, d_inner)
    du_ptr,  # (batch, length, directions, d_inner)
    ddelta_ptr,  # (batch, length, directions, d_inner)
    dA_ptr,  # (batch, directions, d_state, d_inner)
    dB_ptr,  # (num_blocks, batch, length, directions, d_state)
    dC_ptr,  # (num_blocks, batch, length, directions, d_state)
    dD_ptr,  # (batch, directions, d_inner)
    dbias_ptr,  # (batch, directions, d_inner)
    num_rows,  # batch
    length,
    path_length,
    d_inner,
    directions,
    num_blocks,
    num_tiles,
    u_batch,
    u_token,
    delta_batch,
    delta_token,
    delta_direction,
    B_batch,
    B_token,
    B_direction,
    B_state,
    C_batch,
    C_token,
    C_direction,
    C_state,
    D_STATE: tl.constexpr,
    STATES: tl.constexpr,  # the power of two from D_STATE on
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    direction = program % directions
    block = (program // directions) % num_blocks
    batch = program // (directions * num_blocks)

    lane = tl.arange(0, BLOCK_C)
    channel = block * BLOCK_C + lane
    in_channels = channel < d_inner
    bias = tl.load(bias_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
    D = tl.load(D_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
    if D_STATE == 1:
        A = tl.load(A_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
        g_behind = tl.zeros((BLOCK_C,), tl.float32)  # a_{l+1} g_{l+1} of the tile's last step l
        dA = tl.zeros((BLOCK_C,), tl.float32)
    else:
        n_index = tl.arange(0, STATES)[:, None]
        A_mask = in_channels[None, :] & (n_index < D_STATE)
        A_offsets = (direction * d_inner + channel[None, :]) * D_STATE + n_index
        A = tl.load(A_ptr + A_offsets, mask=A_mask, other=0.0)
        g_behind = tl.zeros((STATES, BLOCK_C), tl.float32)
        dA = tl.zeros((STATES, BLOCK_C), tl.float32)
    dD = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)

    u_ptr += batch * u_batch
    delta_ptr += batch * delta_batch + direction * delta_direction
    B_ptr += batch * B_batch + direction * B_direction
    C_ptr += batch * C_batch + direction * C_direction
    dy_ptr += batch * length * d_inner
    du_ptr += (batch * length * directions + direction) * d_inner
    ddelta_ptr += (batch * length * directions + direction) * d_inner
    dB_ptr += ((block * num_rows + batch) * length * directions + direction) * D_STATE
    dC_ptr += ((block * num_rows + batch) * length * directions + direction) * D_STATE
    states_ptr += program * num_tiles * D_STATE * BLOCK_C

    for i in range(num_tiles):
        tile = num_tiles - 1 - i
        step = tile * STEPS + tl.arange(0, STEPS)
        in_path = step < path_length
        token = tl.load(paths_ptr + direction * path_length + step, mask=in_path, other=0)
        mask = in_path[:, None] & in_channels[None, :]
        u = tl.load(u_ptr + token[:, None] * u_token + channel[None, :], mask=mask, other=0.0)
        u = u.to(tl.float32)
        delta = tl.load(delta_ptr + token[:, None] * delta_token + channel[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + token[:, None] * d_inner + channel[None, :], mask=mask, other=0.0)
        dt, slope = _softplus(delta.to(tl.float32) + bias[None, :])
        dt = tl.where(in_path[:, None], dt, 0.0)
        drive = dt * u
        ddt = tl.zeros((STEPS, BLOCK_C), tl.float32)
        ddrive = tl.zeros((STEPS, BLOCK_C), tl.float32)
        for n in range(D_STATE):
            B = tl.load(B_ptr + token * B_token + n * B_state, mask=in_path, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + token * C_token + n * C_state, mask=in_path, other=0.0).to(tl.float32)
            start = tl.load(states_ptr + (tile * D_STATE + n) * BLOCK_C + lane)
            A_n = _state(A, n, D_STATE)
            a = tl.exp2(dt * (A_n * 1.4426950408889634)[None, :])
            b = drive * B[:, None]
            decay, h = tl.associative_scan((a, b), 0, _compose)
            h += decay * start[None, :]
            ones = tl.full((STEPS, BLOCK_C), 1.0, tl.float32)
            _, decay, g = tl.associative_scan((a, ones, C[:, None] * dy), 0, _compose_reversed, reverse=True)
            g += decay * _state(g_behind, n, D_STATE)[None, :]
            g_behind = _with_state(g_behind, n, _row(a * g, 0), D_STATE)

            dlog_a = g * (h - b)  # g_l a_l h_{l-1}
            ddt += A_n[None, :] * dlog_a
            ddrive += g * B[:, None]
            dA_n = _state(dA, n, D_STATE) + tl.sum(dt * dlog_a, axis=0)
            dA = _with_state(dA, n, dA_n, D_STATE)
            n_offsets = token * (directions * D_STATE) + n
            tl.store(dB_ptr + n_offsets, tl.sum(g * drive, axis=1), mask=in_path)
            tl.store(dC_ptr + n_offsets, tl.sum(h * dy, axis=1), mask=in_path)
        ddelta = (ddt + ddrive * u) * slope
        du = ddrive * dt + D[None, :] * dy
        dD += tl.sum(u * dy, axis=0)
        dbias += tl.sum(ddelta, axis=0)
        out_offsets = token[:, None] * (directions * d_inner) + channel[None, :]
        tl.store(ddelta_ptr + out_offsets, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
        tl.store(du_ptr + out_offsets, du.to(du_ptr.dtype.element_ty), mask=mask)

    row = batch * directions + direction
    tl.store(dD_ptr + row * d_inner + channel, dD, mask=in_channels)
    tl.store(dbias_ptr + row * d_inner + channel, dbias, mask=in_channels)
    if D_STATE == 1:
        tl.store(dA_ptr + row * d_inner + channel, dA, mask=in_channels)
    else:
        n_index = tl.arange(0, STATES)[:, None]
        dA_mask = in_channels[None, :] & (n_index < D_STATE)
        tl.store(dA_ptr + (row * D_STATE + n_index) * d_inner + channel[None, :], dA, mask=dA_mask)
