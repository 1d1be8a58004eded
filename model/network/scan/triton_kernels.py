"""The selective scan's Triton kernels, forward and backward; `triton_scan.py` launches them.

Recurrence, per batch row, direction and channel, over the steps l of the path (legend in `reference.py`):

    delta = dt_proj_weight @ dt + delta_bias,   step = softplus(delta),
    h <- exp(step A) h + step B u,   y = sum_n C[n] h[n] + D u

Grid: one program for each (batch row, block of channels, group of directions), groups fastest, so that the
programs which share a block of u run together and find it in the L2 cache. A program walks its path in tiles
of STEPS x BLOCK_C: it loads the path indices of the tile, then u, dt, B and C through them (BLOCK_C channels
of a token are contiguous), projects dt to the tile's channels on the tensor cores, and solves the tile with
an associative scan over its steps. Two steps compose to one,

    (a_1, b_1) then (a_2, b_2) = (a_1 a_2, a_2 b_1 + b_2),   a in (0, 1],

where products may underflow to 0 and never overflow; the state before a tile enters the b of its first step.
All arithmetic is fp32, whatever the tensors are stored in; the projection multiplies what is stored and adds
in fp32. Steps beyond the end of a path have u = 0 (in the backward dy = 0) and so contribute nothing.

A group of several directions is taken one after the other, and each adds to the y in fp32 that those before
it wrote: no other program touches it, so the order of the sum is fixed. It pays where y stays in the L2 cache
in between (`triton_scan.py` decides).

Backward: with g_l = dL/dh_l in all, g_l = C_l dy_l + a_{l+1} g_{l+1}. Tiles are taken last to first, with
their last step first, so that this scan too runs along the tile (Triton reverses a scan by shuffling every
element). The states h are read back where the forward has stored them all, which it does if a channel has
one; if it has more, the forward stores those at the start of each tile, and the backward repeats the tile's
scan. The gradient of delta is written by direction, `(directions, batch, length, d_inner)`, which two matrix
products turn into those of dt and of the weight without a copy. Sums over batch rows (A, D, delta_bias) and
over blocks of channels (B, C) are written as partial sums for torch to add; nothing is accumulated
atomically, so results do not vary between runs.

Bytes moved per token and direction, in rows of d_inner (dt is a 32nd of one, and three directions of four
find u in the L2 cache): forward y, and the states in training; or, for a group that stays in the cache, a
y in fp32 for all its directions; backward states, delta's gradient and du (u and dy as before). A delta
given would be one row more to read in either, and to write and read before and after them. A scan that wants
`(batch, channels, length)` moves as much, and before and after it gathers u and delta and scatters y.
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
def _second(x_1, x_2):  # type: ignore[no-untyped-def]  # kernel
    """A scan with this changes no value, but only the layout that Triton gives it; see `_delta`."""
    return x_2


@jit
def _softplus(x):  # type: ignore[no-untyped-def]  # kernel
    """softplus(x) = max(x, 0) + log1p(z) and z = exp(-|x|), to fp32 precision.

    log(1 + z) would lose the small steps (x about -7) that Mamba starts from. So log1p(z) / z on [0, 1] is a
    polynomial, the minimax of its degree, wrong by 3e-8 at most and by 2e-7 with the rounding of its sums: a
    division is dearer.
    """
    z = tl.exp2(tl.abs(x) * -1.4426950408889634)
    series = -0.0295052771 + z * 0.00523270248
    series = 0.0782260299 + z * series
    series = -0.136632532 + z * series
    series = 0.191060111 + z * series
    series = -0.248429835 + z * series
    series = 0.333190978 + z * series
    series = -0.499994934 + z * series
    series = 0.99999994 + z * series
    return tl.maximum(x, 0.0) + z * series, z


@jit
def _weight(weight_ptr, channel, in_channels, RANK: tl.constexpr, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """A block of one direction's projection, transposed: `(RANKS, channels)`, zeros from RANK on."""
    r = tl.arange(0, RANKS)
    mask = (r < RANK)[:, None] & in_channels[None, :]
    return tl.load(weight_ptr + channel[None, :] * RANK + r[:, None], mask=mask, other=0.0)


@jit
def _delta(  # type: ignore[no-untyped-def]  # kernel
    dt_ptr,
    weight,
    bias,
    token,
    in_path,
    DT_TOKEN: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES_ARE_CHANNELS: tl.constexpr,
):
    """The tile's step sizes before softplus, with their bias: `(steps, channels)` in fp32.

    A dot product's result lies across the threads as the tensor cores leave it, and Triton would let all
    arithmetic after it follow, up to the scan. The empty scan ends that: the tile moves through shared memory
    once, here, to the layout in which u was loaded and y is stored (without it, u, a and b each do, and the
    forward needs 238 registers a thread instead of 168). With LANES_ARE_CHANNELS a thread holds whole columns
    or shares them with few, and the empty scan costs nothing or little.
    """
    r = tl.arange(0, RANKS)
    mask = in_path[:, None] & (r < RANK)[None, :]
    dt = tl.load(dt_ptr + token[:, None] * DT_TOKEN + r[None, :], mask=mask, other=0.0)
    delta = tl.dot(dt, weight, input_precision=PRECISION) + bias[None, :]
    if LANES_ARE_CHANNELS:
        delta = tl.associative_scan(delta, 0, _second)
    return delta


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
def selective_scan_fwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,
    dt_ptr,  # (batch, length, directions, rank)
    weight_ptr,  # (directions, d_inner, rank)
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    paths_ptr,
    y_ptr,  # (batch, length, directions / MERGED, d_inner)
    states_ptr,  # (batch, directions, path_length, d_inner), or
    # (batch, directions, num_blocks, num_tiles, d_state, BLOCK_C)
    length,
    path_length,
    d_inner,
    directions,
    num_blocks,
    num_tiles,
    u_batch,
    u_token,
    dt_batch,
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
    RANK: tl.constexpr,
    RANKS: tl.constexpr,  # the power of two from RANK on, 16 at least
    DT_TOKEN: tl.constexpr,  # strides of dt: constants, from which the compiler sees how wide it may load
    DT_DIRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES_ARE_CHANNELS: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    MERGED: tl.constexpr,  # directions that a program takes, one after the other
    GAPS: tl.constexpr,  # paths leave tokens out, and y holds zeros
):
    program = tl.program_id(0).to(tl.int64)
    groups = directions // MERGED
    group = program % groups
    block = (program // groups) % num_blocks
    batch = program // (groups * num_blocks)

    lane = tl.arange(0, BLOCK_C)
    channel = tl.max_contiguous(block.to(tl.int32) * BLOCK_C + lane, VECTOR)
    in_channels = channel < d_inner
    first = (tl.arange(0, STEPS) == 0)[:, None]
    u_ptr += batch * u_batch
    y_ptr += (batch * length * groups + group) * d_inner

    for k in range(MERGED):
        direction = group * MERGED + k
        vector = direction * d_inner + channel
        bias = tl.load(bias_ptr + vector, mask=in_channels, other=0.0)
        D = tl.load(D_ptr + vector, mask=in_channels, other=0.0)
        if D_STATE == 1:
            A = tl.load(A_ptr + vector, mask=in_channels, other=0.0)
            states = tl.zeros((BLOCK_C,), tl.float32)
        else:
            n_index = tl.arange(0, STATES)[:, None]
            A_mask = in_channels[None, :] & (n_index < D_STATE)
            A = tl.load(A_ptr + vector[None, :] * D_STATE + n_index, mask=A_mask, other=0.0)
            states = tl.zeros((STATES, BLOCK_C), tl.float32)
        A *= 1.4426950408889634  # exp(dt A) = exp2(dt A log2(e))
        weight = _weight(weight_ptr + direction * d_inner * RANK, channel, in_channels, RANK, RANKS)

        k_dt_ptr = dt_ptr + batch * dt_batch + direction * DT_DIRECTION
        k_B_ptr = B_ptr + batch * B_batch + direction * B_direction
        k_C_ptr = C_ptr + batch * C_batch + direction * C_direction
        k_paths_ptr = paths_ptr + direction * path_length
        row = batch * directions + direction
        if D_STATE == 1:
            k_states_ptr = states_ptr + row * path_length * d_inner
        else:
            k_states_ptr = states_ptr + (row * num_blocks + block) * num_tiles * D_STATE * BLOCK_C

        for tile in range(num_tiles):
            step = tile * STEPS + tl.arange(0, STEPS)
            in_path = step < path_length
            token = tl.load(k_paths_ptr + step, mask=in_path, other=0).to(tl.int32)
            mask = in_path[:, None] & in_channels[None, :]
            u = tl.load(u_ptr + token[:, None] * u_token + channel[None, :], mask=mask, other=0.0)
            u = u.to(tl.float32)
            delta = _delta(
                k_dt_ptr,
                weight,
                bias,
                token,
                in_path,
                DT_TOKEN,
                RANK,
                RANKS,
                PRECISION,
                LANES_ARE_CHANNELS,
            )
            # Beyond the end u is 0 and nothing enters the state; what leaves it there, no one reads.
            dt, _ = _softplus(delta)
            drive = dt * u
            y = D[None, :] * u
            for n in range(D_STATE):
                B = tl.load(k_B_ptr + token * B_token + n * B_state, mask=in_path, other=0.0).to(tl.float32)
                C = tl.load(k_C_ptr + token * C_token + n * C_state, mask=in_path, other=0.0).to(tl.float32)
                start = _state(states, n, D_STATE)
                if SAVE_STATES and D_STATE > 1:
                    tl.store(k_states_ptr + (tile * D_STATE + n) * BLOCK_C + lane, start)
                a = tl.exp2(dt * _state(A, n, D_STATE)[None, :])
                b = drive * B[:, None]
                b = tl.where(first, b + a * start[None, :], b)
                _, h = tl.associative_scan((a, b), 0, _compose)
                y += C[:, None] * h
                if SAVE_STATES and D_STATE == 1:
                    h_offsets = step[:, None] * d_inner + channel[None, :]
                    tl.store(k_states_ptr + h_offsets, h.to(states_ptr.dtype.element_ty), mask=mask)
                states = _with_state(states, n, _row(h, STEPS - 1), D_STATE)
            y_offsets = token[:, None] * (groups * d_inner) + channel[None, :]
            if MERGED > 1:
                written = mask  # by the directions before, in paths with gaps by zeros
                if not GAPS:
                    written = mask & (k > 0)
                y += tl.load(y_ptr + y_offsets, mask=written, other=0.0)
            tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        if MERGED > 1:
            tl.debug_barrier()  # other threads of the program read what this one wrote


@jit
def selective_scan_bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,
    dt_ptr,  # (batch, length, directions, rank)
    weight_ptr,  # (directions, d_inner, rank)
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    paths_ptr,
    states_ptr,  # (batch, directions, path_length, d_inner), or
    # (batch, directions, num_blocks, num_tiles, d_state, BLOCK_C)
    dy_ptr,  # (batch, length, d_inner)
    du_ptr,  # (batch, length, directions, d_inner)
    ddelta_ptr,  # (directions, batch, length, d_inner)
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
    dt_batch,
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
    RANK: tl.constexpr,
    RANKS: tl.constexpr,  # the power of two from RANK on, 16 at least
    DT_TOKEN: tl.constexpr,
    DT_DIRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES_ARE_CHANNELS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    direction = program % directions
    block = (program // directions) % num_blocks
    batch = program // (directions * num_blocks)

    lane = tl.arange(0, BLOCK_C)
    channel = tl.max_contiguous(block.to(tl.int32) * BLOCK_C + lane, VECTOR)
    in_channels = channel < d_inner
    first = (tl.arange(0, STEPS) == 0)[:, None]
    last = (tl.arange(0, STEPS) == STEPS - 1)[:, None]
    bias = tl.load(bias_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
    D = tl.load(D_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
    weight = _weight(weight_ptr + direction * d_inner * RANK, channel, in_channels, RANK, RANKS)
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
    dt_ptr += batch * dt_batch + direction * DT_DIRECTION
    B_ptr += batch * B_batch + direction * B_direction
    C_ptr += batch * C_batch + direction * C_direction
    dy_ptr += batch * length * d_inner
    du_ptr += (batch * length * directions + direction) * d_inner
    ddelta_ptr += (direction * num_rows + batch) * length * d_inner
    dB_ptr += ((block * num_rows + batch) * length * directions + direction) * D_STATE
    dC_ptr += ((block * num_rows + batch) * length * directions + direction) * D_STATE
    if D_STATE == 1:
        states_ptr += (batch * directions + direction) * path_length * d_inner
    else:
        row = batch * directions + direction
        states_ptr += (row * num_blocks + block) * num_tiles * D_STATE * BLOCK_C

    for i in range(num_tiles):
        tile = num_tiles - 1 - i
        step = tile * STEPS + (STEPS - 1 - tl.arange(0, STEPS))  # last step first, as g is scanned
        in_path = step < path_length
        token = tl.load(paths_ptr + direction * path_length + step, mask=in_path, other=0).to(tl.int32)
        mask = in_path[:, None] & in_channels[None, :]
        u = tl.load(u_ptr + token[:, None] * u_token + channel[None, :], mask=mask, other=0.0)
        u = u.to(tl.float32)
        dy = tl.load(dy_ptr + token[:, None] * d_inner + channel[None, :], mask=mask, other=0.0)
        delta = _delta(
            dt_ptr,
            weight,
            bias,
            token,
            in_path,
            DT_TOKEN,
            RANK,
            RANKS,
            PRECISION,
            LANES_ARE_CHANNELS,
        )
        dt, z = _softplus(delta)
        slope = tl.where(delta >= 0.0, 1.0, z) / (1.0 + z)
        drive = dt * u
        ddt = tl.zeros((STEPS, BLOCK_C), tl.float32)
        ddrive = tl.zeros((STEPS, BLOCK_C), tl.float32)
        for n in range(D_STATE):
            B = tl.load(B_ptr + token * B_token + n * B_state, mask=in_path, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + token * C_token + n * C_state, mask=in_path, other=0.0).to(tl.float32)
            A_n = _state(A, n, D_STATE)
            a = tl.exp2(dt * (A_n * 1.4426950408889634)[None, :])
            b = drive * B[:, None]
            if D_STATE == 1:
                h_offsets = (step[:, None] - 1) * d_inner + channel[None, :]
                h = tl.load(states_ptr + h_offsets, mask=mask & (step > 0)[:, None], other=0.0)
                kept = a * h.to(tl.float32)  # of the state before the step
                h = kept + b
            else:
                start = tl.load(states_ptr + (tile * D_STATE + n) * BLOCK_C + lane)
                entering = tl.where(last, b + a * start[None, :], b)
                _, h = tl.associative_scan((a, entering), 0, _compose, reverse=True)
                kept = h - b
            ones = tl.full((STEPS, BLOCK_C), 1.0, tl.float32)
            dh = C[:, None] * dy
            dh = tl.where(first, dh + _state(g_behind, n, D_STATE)[None, :], dh)
            _, _, g = tl.associative_scan((a, ones, dh), 0, _compose_reversed)
            g_behind = _with_state(g_behind, n, _row(a * g, STEPS - 1), D_STATE)

            dlog_a = g * kept
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
        ddelta_offsets = token[:, None] * d_inner + channel[None, :]
        tl.store(ddelta_ptr + ddelta_offsets, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
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
