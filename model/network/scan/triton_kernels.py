"""The selective scan's Triton kernels, forward and backward; `triton_scan.py` launches them.

Recurrence, per batch row, direction and channel, over the steps l of the path (legend in `reference.py`):

    delta = dt_proj_weight @ dt + delta_bias,   step = softplus(delta),
    h <- exp(step A) h + step B u,   y = sum_n C[n] h[n] + D u

Grid: one program for each (batch row, block of channels, chunk of the path, direction), directions fastest,
so that the programs which share a block of u run together and find it in the L2 cache. A program walks its
chunk in tiles of STEPS x BLOCK_C: it loads the path indices of the tile, then u, dt, B and C through them
(BLOCK_C channels of a token are contiguous; all are fetched a tile or two ahead), projects dt to the tile's
channels on the tensor cores, and solves the tile with an associative scan over its steps. Two steps compose
to one,

    (a_1, b_1) then (a_2, b_2) = (a_1 a_2, a_2 b_1 + b_2),   a in (0, 1],

where products may underflow to 0 and never overflow; the state before a tile enters the b of its first step.
All arithmetic is fp32, whatever the tensors are stored in; the projection multiplies what is stored and adds
in fp32. Steps beyond the end of a path have u = 0 (in the backward dy = 0) and so contribute nothing.

Step sizes are kept in units of ln 2 (log2(e) step), in which softplus and the decay need no factor.

Chunks: where rows and channels make too few programs, a path is cut, and the kernel runs twice. First each
chunk but the last is walked from h = 0, for its decay and its end alone (ENDS_ONLY); then each composes those
of the chunks before it to the state that it starts from. That is more than half as much work again, for as
many more programs as there are chunks.

Backward: with g_l = dL/dh_l in all, g_l = C_l dy_l + a_{l+1} g_{l+1}. Tiles are taken last to first, with
their last step first, so that this scan too runs along the tile (Triton reverses a scan by shuffling every
element). The states h are read back where the forward has stored them all, which it does if a channel has
one; if it has more, the forward stores those at the start of each tile, and the backward repeats the tile's
scan. The gradient of delta is written by direction, `(directions, batch, length, d_inner)`, which two matrix
products turn into those of dt and of the weight without a copy. Sums over batch rows (A, D, delta_bias) and
over blocks of channels (B, C) are written as partial sums for torch to add; nothing is accumulated
atomically, so results do not vary between runs.

Bytes moved per token and direction, in rows of d_inner (dt is a 32nd of one, and three directions of four
find u in the L2 cache): forward y, and the states in training; backward states, delta's gradient and du (u
and dy as before). A delta given would be one row more to read in either, and to write and read before and
after them. A scan that wants `(batch, channels, length)` moves as much, and before and after it gathers u and
delta and scatters y.
"""

from __future__ import annotations

from model.network.triton_jit import jit, tl

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
def _softplus(x, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """log2(1 + 2^x) = max(x, 0) + log2(1 + z) and z = 2^-|x|: softplus in units of ln 2.

    log(1 + z) would lose the small steps (x about -10) that Mamba starts from. So log2(1 + z) / z on [0, 1]
    is a polynomial, the minimax of its degree: EXACT wrong by 3e-8 at most, and by 2e-7 with the rounding of
    its sums (a division is dearer); else by 6e-5, a 30th of what half precisions lose in x alone.
    """
    z = tl.exp2(-tl.abs(x))
    if EXACT:
        series = -0.0425670703 + z * 0.00754918346
        series = 0.112856213 + z * series
        series = -0.197118993 + z * series
        series = 0.275641427 + z * series
        series = -0.358408478 + z * series
        series = 0.480692958 + z * series
        series = -0.721340208 + z * series
        series = 1.442695 + z * series
    else:
        series = -0.227119494 + z * 0.059651558
        series = 0.44189888 + z * series
        series = -0.716987433 + z * series
        series = 1.44261321 + z * series
    return tl.maximum(x, 0.0) + z * series, z


@jit
def _weight(weight_ptr, channel, in_channels, RANK: tl.constexpr, FROM: tl.constexpr, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """RANKS ranks of a block of one direction's projection, transposed: `(RANKS, channels)`, zeros from RANK
    on.
    """
    r = FROM + tl.arange(0, RANKS)
    mask = (r < RANK)[:, None] & in_channels[None, :]
    return tl.load(weight_ptr + channel[None, :] * RANK + r[:, None], mask=mask, other=0.0)


@jit
def _projected(  # type: ignore[no-untyped-def]  # kernel
    dt_ptrs, in_path, weight, delta, RANK: tl.constexpr, FROM: tl.constexpr, PRECISION: tl.constexpr
):
    """`delta` and what the ranks of `weight` add to it."""
    r = FROM + tl.arange(0, weight.shape[0])
    mask = in_path[:, None] & (r < RANK)[None, :]
    dt = tl.load(dt_ptrs[:, None] + r[None, :], mask=mask, other=0.0)
    return tl.dot(dt, weight, delta, input_precision=PRECISION)


@jit
def _delta(  # type: ignore[no-untyped-def]  # kernel
    dt_ptrs,
    weight,
    rest,
    bias,
    in_path,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES_ARE_CHANNELS: tl.constexpr,
):
    """The tile's step sizes before softplus, with their bias, times log2(e): `(steps, channels)` in fp32.

    A dot product's result lies across the threads as the tensor cores leave it, and Triton would let all
    arithmetic after it follow, up to the scan. The empty scan ends that: the tile moves through shared memory
    once, here, to the layout in which u was loaded and y is stored. With LANES_ARE_CHANNELS a thread holds
    whole columns or shares them with few, and the empty scan costs nothing or little.
    """
    delta = tl.zeros((in_path.shape[0], bias.shape[0]), tl.float32)
    delta = _projected(dt_ptrs, in_path, weight, delta, RANK, 0, PRECISION)
    if REST > 0:
        delta = _projected(dt_ptrs, in_path, rest, delta, RANK, RANKS, PRECISION)
    if LANES_ARE_CHANNELS:
        delta = tl.associative_scan(delta, 0, _second)
    return delta * 1.4426950408889634 + bias[None, :]


@jit
def _pair(ptrs, mask):  # type: ignore[no-untyped-def]  # kernel
    """Numbers of 16 bits and their right neighbours in fp32, by one load of both."""
    pair = tl.load(ptrs.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
    left = pair.to(tl.int16).to(ptrs.dtype.element_ty, bitcast=True)
    right = (pair >> 16).to(tl.int16).to(ptrs.dtype.element_ty, bitcast=True)
    return left.to(tl.float32), right.to(tl.float32)


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
    A_log_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    paths_ptr,
    y_ptr,  # (batch, length, directions, d_inner)
    states_ptr,  # (batch, directions, path_length, d_inner), or
    # (batch, directions, num_blocks, num_tiles, d_state, BLOCK_C)
    decays_ptr,  # (batch, directions, CHUNKS, d_inner)
    ends_ptr,  # (batch, directions, CHUNKS, d_inner)
    length,
    path_length,
    d_inner,
    directions,
    num_blocks,
    num_chunks,  # that are walked: CHUNKS, or one less
    num_tiles,  # of a chunk
    u_batch,
    dt_batch,
    B_batch,
    B_direction,
    B_state,
    C_batch,
    C_direction,
    C_state,
    D_STATE: tl.constexpr,
    STATES: tl.constexpr,  # the power of two from D_STATE on
    RANK: tl.constexpr,
    RANKS: tl.constexpr,  # RANKS + REST cover RANK
    REST: tl.constexpr,
    U_TOKEN: tl.constexpr,  # strides: constants, from which the compiler makes an address in one instruction
    DT_TOKEN: tl.constexpr,  # and sees how wide it may load
    DT_DIRECTION: tl.constexpr,
    B_TOKEN: tl.constexpr,
    C_TOKEN: tl.constexpr,
    Y_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES_ARE_CHANNELS: tl.constexpr,
    PAIRED: tl.constexpr,  # C's numbers are the right neighbours of B's: see `_pair`
    EVEN: tl.constexpr,  # tiles end with the path, and blocks with the channels
    CHUNKS: tl.constexpr,
    ENDS_ONLY: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    STAGES: tl.constexpr,  # how many tiles are under way
):
    program = tl.program_id(0)
    direction = program % directions
    chunk = (program // directions) % num_chunks
    block = (program // (directions * num_chunks)) % num_blocks
    batch = (program // (directions * num_chunks * num_blocks)).to(tl.int64)
    row = batch * directions + direction

    channel = tl.max_contiguous(block * BLOCK_C + tl.arange(0, BLOCK_C), VECTOR)
    in_channels = channel < d_inner
    first = (tl.arange(0, STEPS) == 0)[:, None]
    vector = direction * d_inner + channel
    bias = tl.load(bias_ptr + vector, mask=in_channels, other=0.0).to(tl.float32) * 1.4426950408889634
    D = tl.load(D_ptr + vector, mask=in_channels, other=0.0).to(tl.float32)
    if D_STATE == 1:
        A = -tl.exp(tl.load(A_log_ptr + vector, mask=in_channels, other=0.0).to(tl.float32))
        states = tl.zeros((BLOCK_C,), tl.float32)
        states_ptr += row * path_length * d_inner
    else:
        n_index = tl.arange(0, STATES)[:, None]
        A_mask = in_channels[None, :] & (n_index < D_STATE)
        A_log = tl.load(A_log_ptr + vector[None, :] * D_STATE + n_index, mask=A_mask, other=0.0)
        A = -tl.exp(A_log.to(tl.float32))
        states = tl.zeros((STATES, BLOCK_C), tl.float32)
        states_ptr += (row * num_blocks + block) * num_tiles * D_STATE * BLOCK_C
    weight_ptr += direction * d_inner * RANK
    weight = _weight(weight_ptr, channel, in_channels, RANK, 0, RANKS)
    rest = weight
    if REST > 0:
        rest = _weight(weight_ptr, channel, in_channels, RANK, RANKS, REST)

    u_ptrs = u_ptr + batch * u_batch + channel
    y_ptrs = y_ptr + (batch * length * Y_TOKEN + direction * d_inner) + channel
    dt_ptr += batch * dt_batch + direction * DT_DIRECTION
    B_ptr += batch * B_batch + direction * B_direction
    C_ptr += batch * C_batch + direction * C_direction
    paths_ptr += direction * path_length
    chunk_offsets = row * CHUNKS * d_inner + channel
    decay = tl.full((BLOCK_C,), 1.0, tl.float32)  # of the chunk

    if CHUNKS > 1 and not ENDS_ONLY:
        other = tl.arange(0, CHUNKS)[:, None]
        earlier = (other < chunk) & in_channels[None, :]
        decays = tl.load(decays_ptr + chunk_offsets[None, :] + other * d_inner, mask=earlier, other=1.0)
        ends = tl.load(ends_ptr + chunk_offsets[None, :] + other * d_inner, mask=earlier, other=0.0)
        decays, ends = tl.associative_scan((decays, ends), 0, _compose)
        states = _row(ends, CHUNKS - 1)

    for tile in tl.range(0, num_tiles, num_stages=STAGES):
        step = (chunk * num_tiles + tile) * STEPS + tl.arange(0, STEPS)
        in_path = step < path_length
        mask = in_path[:, None] & in_channels[None, :]
        if EVEN:
            in_path = tl.full((STEPS,), 1, tl.int1)
            mask = tl.full((STEPS, BLOCK_C), 1, tl.int1)
        token = tl.load(paths_ptr + step, mask=in_path, other=0).to(tl.int64)
        u = tl.load(u_ptrs[None, :] + (token * U_TOKEN)[:, None], mask=mask, other=0.0)
        delta = _delta(
            dt_ptr + token * DT_TOKEN,
            weight,
            rest,
            bias,
            in_path,
            RANK,
            RANKS,
            REST,
            PRECISION,
            LANES_ARE_CHANNELS,
        )
        u = u.to(tl.float32)
        # Beyond the end u is 0 and nothing enters the state; what leaves it there, no one reads.
        dt, _ = _softplus(delta, EXACT)
        drive = dt * u
        y = D[None, :] * u
        for n in range(D_STATE):
            B_ptrs = B_ptr + token * B_TOKEN + n * B_state
            if PAIRED:
                B, C = _pair(B_ptrs, in_path)
            else:
                B = tl.load(B_ptrs, mask=in_path, other=0.0).to(tl.float32)
            B *= 0.6931471805599453
            start = _state(states, n, D_STATE)
            if SAVE_STATES and D_STATE > 1:
                lane = tl.arange(0, BLOCK_C)
                tl.store(states_ptr + (tile * D_STATE + n) * BLOCK_C + lane, start)
            a = tl.exp2(dt * _state(A, n, D_STATE)[None, :])
            b = drive * B[:, None]
            b = tl.where(first, b + a * start[None, :], b)
            along, h = tl.associative_scan((a, b), 0, _compose)
            if ENDS_ONLY:
                decay *= _row(along, STEPS - 1)
            else:
                if not PAIRED:
                    C_ptrs = C_ptr + token * C_TOKEN + n * C_state
                    C = tl.load(C_ptrs, mask=in_path, other=0.0).to(tl.float32)
                y += C[:, None] * h
            if SAVE_STATES and D_STATE == 1:
                h_offsets = step[:, None] * d_inner + channel[None, :]
                tl.store(states_ptr + h_offsets, h.to(states_ptr.dtype.element_ty), mask=mask)
            states = _with_state(states, n, _row(h, STEPS - 1), D_STATE)
        if not ENDS_ONLY:
            y_ptrs_here = y_ptrs[None, :] + (token * Y_TOKEN)[:, None]
            tl.store(y_ptrs_here, y.to(y_ptr.dtype.element_ty), mask=mask)

    if ENDS_ONLY:
        tl.store(decays_ptr + chunk_offsets + chunk * d_inner, decay, mask=in_channels)
        tl.store(ends_ptr + chunk_offsets + chunk * d_inner, states, mask=in_channels)


@jit
def selective_scan_bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,
    dt_ptr,  # (batch, length, directions, rank)
    weight_ptr,  # (directions, d_inner, rank)
    A_log_ptr,
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
    dA_log_ptr,  # (batch, directions, d_state, d_inner)
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
    dt_batch,
    B_batch,
    B_direction,
    B_state,
    C_batch,
    C_direction,
    C_state,
    D_STATE: tl.constexpr,
    STATES: tl.constexpr,  # the power of two from D_STATE on
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    REST: tl.constexpr,
    U_TOKEN: tl.constexpr,
    DT_TOKEN: tl.constexpr,
    B_TOKEN: tl.constexpr,
    C_TOKEN: tl.constexpr,
    DT_DIRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES_ARE_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,  # how many tiles are under way
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
    bias = tl.load(bias_ptr + direction * d_inner + channel, mask=in_channels, other=0.0).to(tl.float32)
    bias *= 1.4426950408889634
    D = tl.load(D_ptr + direction * d_inner + channel, mask=in_channels, other=0.0).to(tl.float32)
    weight_ptr += direction * d_inner * RANK
    weight = _weight(weight_ptr, channel, in_channels, RANK, 0, RANKS)
    rest = weight
    if REST > 0:
        rest = _weight(weight_ptr, channel, in_channels, RANK, RANKS, REST)
    if D_STATE == 1:
        A_log = tl.load(A_log_ptr + direction * d_inner + channel, mask=in_channels, other=0.0)
        g_behind = tl.zeros((BLOCK_C,), tl.float32)  # a_{l+1} g_{l+1} of the tile's last step l
        dA = tl.zeros((BLOCK_C,), tl.float32)
    else:
        n_index = tl.arange(0, STATES)[:, None]
        A_mask = in_channels[None, :] & (n_index < D_STATE)
        A_offsets = (direction * d_inner + channel[None, :]) * D_STATE + n_index
        A_log = tl.load(A_log_ptr + A_offsets, mask=A_mask, other=0.0)
        g_behind = tl.zeros((STATES, BLOCK_C), tl.float32)
        dA = tl.zeros((STATES, BLOCK_C), tl.float32)
    A = -tl.exp(A_log.to(tl.float32))
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

    for i in tl.range(0, num_tiles, num_stages=STAGES):
        tile = num_tiles - 1 - i
        step = tile * STEPS + (STEPS - 1 - tl.arange(0, STEPS))  # last step first, as g is scanned
        in_path = step < path_length
        token = tl.load(paths_ptr + direction * path_length + step, mask=in_path, other=0).to(tl.int64)
        mask = in_path[:, None] & in_channels[None, :]
        u = tl.load(u_ptr + (token * U_TOKEN)[:, None] + channel[None, :], mask=mask, other=0.0)
        u = u.to(tl.float32)
        dy = tl.load(dy_ptr + token[:, None] * d_inner + channel[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        delta = _delta(
            dt_ptr + token * DT_TOKEN,
            weight,
            rest,
            bias,
            in_path,
            RANK,
            RANKS,
            REST,
            PRECISION,
            LANES_ARE_CHANNELS,
        )
        dt, z = _softplus(delta, EXACT)
        dt *= 0.6931471805599453
        slope = tl.where(delta >= 0.0, 1.0, z) / (1.0 + z)
        drive = dt * u
        ddt = tl.zeros((STEPS, BLOCK_C), tl.float32)
        ddrive = tl.zeros((STEPS, BLOCK_C), tl.float32)
        for n in range(D_STATE):
            B = tl.load(B_ptr + token * B_TOKEN + n * B_state, mask=in_path, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + token * C_TOKEN + n * C_state, mask=in_path, other=0.0).to(tl.float32)
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
    dA_log = dA * A
    if D_STATE == 1:
        tl.store(dA_log_ptr + row * d_inner + channel, dA_log, mask=in_channels)
    else:
        n_index = tl.arange(0, STATES)[:, None]
        dA_mask = in_channels[None, :] & (n_index < D_STATE)
        tl.store(dA_log_ptr + (row * D_STATE + n_index) * d_inner + channel[None, :], dA_log, mask=dA_mask)
