"""Window attention's Triton kernels, forward and backward; `window_attention.py` launches them.

Per window and head (equation 2; legend: M*M tokens a window, d channels, heads of head_dim = d / heads):

    S = q k^T head_dim^-0.5 + bias[query - key] + mask,   P = softmax(S),   out = P v

With QK_NORM q and k are first normed over their channels, q r w with r = (mean_d q^2 + eps)^-0.5, in fp32 and
rounded to their dtype before the product, as a norm of its own would leave them.

A kernel reads q, k and v where the projection left them, in `qkv (B, H, W, 3d)`, and writes `(B, H, W, d)`.
The cyclic shift and the cut into windows are the order in which it does so: a window's slot i is the token at

    row = (window's row * M + i // M + shift) mod H,   column likewise.

So nothing is rolled or rearranged, and a token's 4d numbers move once: 3d in, d out. The backward moves 7d
(qkv and dout in, dqkv out) and keeps nothing of the forward but qkv: a window's P is one tile, cheaper to
compute again than to store statistics of, and the softmax's gradient takes its sum_j P_ij dP_ij from that
tile, not from out.

Grid: a program has one head and visits every `chunks`-th window of the batch. The heads of a chunk are
neighbours, so that the programs which share the sectors of a token (a head of 20 channels has 40 bytes of its
row) run together and find them in the L2 cache. A head's bias is the same in all windows: a program gathers
it from the table once, in fp32, and keeps it in registers. In the backward it adds up dS over its windows the
same way and writes one tile; `bias_grad_kernel` brings the tiles' sum to the table's rows. Nothing is
accumulated atomically, so results do not vary between runs.

Tiles: q, k, v are BLOCK_T x BLOCK_D, the logits BLOCK_T x BLOCK_T, sides rounded up to powers of two from 16
on, as tensor cores want them. For windows of 8 x 8 the logits are 64 x 64: the rows of one wgmma of 4 warps,
32 fp32 registers a thread. A head_dim of 20 is padded to 32, of 80 to 128: these kernels are bound by memory,
which padding does not touch, and multiply at a small part of the tensor cores' rate.
"""

from __future__ import annotations

from functools import partial

from model.network import triton_jit
from model.network.triton_jit import tl

# The number of windows grows with the batch: a kernel compiled for one batch size must serve them all.
jit = partial(triton_jit.jit, do_not_specialize=["num_windows"])

# A kernel's parameters are Triton's (pointers, integers, tiles): they have no Python type to annotate.


@jit
def _window(  # type: ignore[no-untyped-def]  # kernel
    window,
    height,
    width,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A window's batch row; the token in the grid of each of its slots; and that token's region, of the nine
    between which the shift mask stands (`geometry._shift_regions`).
    """
    windows_a_row = width // WINDOW_COLUMNS
    windows_a_grid = (height // WINDOW_ROWS) * windows_a_row
    place = window % windows_a_grid
    slot = tl.arange(0, BLOCK_T)
    row = (place // windows_a_row) * WINDOW_ROWS + slot // WINDOW_COLUMNS  # of the rolled grid
    column = (place % windows_a_row) * WINDOW_COLUMNS + slot % WINDOW_COLUMNS
    row_region = (row >= height - WINDOW_ROWS).to(tl.int32) + (row >= height - SHIFT_ROWS).to(tl.int32)
    column_region = (column >= width - WINDOW_COLUMNS).to(tl.int32)
    column_region += (column >= width - SHIFT_COLUMNS).to(tl.int32)
    token = ((row + SHIFT_ROWS) % height) * width + (column + SHIFT_COLUMNS) % width
    return (window // windows_a_grid).to(tl.int64), token, 3 * row_region + column_region


@jit
def _bias(  # type: ignore[no-untyped-def]  # kernel
    table_ptr,  # ((2 TABLE_WINDOW - 1)^2, HEADS)
    head,
    HEADS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    TABLE_WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A head's bias times log2(e), (query, key), with -inf at keys beyond the window."""
    query = tl.arange(0, BLOCK_T)[:, None]
    key = tl.arange(0, BLOCK_T)[None, :]
    dy = query // WINDOW_COLUMNS - key // WINDOW_COLUMNS
    dx = query % WINDOW_COLUMNS - key % WINDOW_COLUMNS
    entry = (dy + (TABLE_WINDOW - 1)) * (2 * TABLE_WINDOW - 1) + dx + (TABLE_WINDOW - 1)
    in_window = (query < TOKENS) & (key < TOKENS)
    bias = tl.load(table_ptr + entry * HEADS + head, mask=in_window, other=0.0).to(tl.float32)
    return tl.where(key < TOKENS, bias * 1.4426950408889634, float("-inf"))


@jit
def _norm_weights(  # type: ignore[no-untyped-def]  # kernel
    weight_ptr, lane, HEAD_DIM: tl.constexpr, QK_NORM: tl.constexpr
):
    """The weights (1, BLOCK_D) of the queries' norm and of the keys', in fp32."""
    if QK_NORM:
        in_head = lane < HEAD_DIM
        q_weight = tl.load(weight_ptr + lane, mask=in_head, other=0.0).to(tl.float32)
        k_weight = tl.load(weight_ptr + HEAD_DIM + lane, mask=in_head, other=0.0).to(tl.float32)
        return q_weight[None, :], k_weight[None, :]
    else:
        return 0.0, 0.0


@jit
def _load_normed(  # type: ignore[no-untyped-def]  # kernel
    ptrs, mask, weight, eps, HEAD_DIM: tl.constexpr, QK_NORM: tl.constexpr
):
    """Queries or keys x (BLOCK_T, BLOCK_D) as the logits take them; for the gradient x r and r, in fp32."""
    x = tl.load(ptrs, mask=mask, other=0.0)
    if QK_NORM:
        x32 = x.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x32 * x32, axis=1) / HEAD_DIM + eps)[:, None]
        unit = x32 * r
        return (unit * weight).to(x.dtype), unit, r
    else:
        return x, 0.0, 0.0


@jit
def _norm_grad(dnormed, weight, unit, r, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """The gradient of x, of that of x r w: r (g - x r mean_d(g x r)), g = w dnormed."""
    g = dnormed * weight
    return r * (g - unit * (tl.sum(g * unit, axis=1) / HEAD_DIM)[:, None])


@jit
def _exp_logits(  # type: ignore[no-untyped-def]  # kernel
    q, k, bias, region, scale, SHIFTED: tl.constexpr
):
    """exp(S - max_j S) of each query. exp(x) = exp2(x log2(e)): `scale` and `bias` bring that factor along.

    fp32 products are three of TF32 parts (tf32x3), exact to about 2**-22; other dtypes are exact in fp32.
    """
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale + bias
    if SHIFTED:
        # -100 log2(e), not -inf: as in the released code.
        logits = tl.where(region[:, None] == region[None, :], logits, logits - 144.26950408889634)
    return tl.exp2(logits - tl.max(logits, axis=1)[:, None])


@jit
def window_attention_fwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    qkv_ptr,  # (batch, height, width, 3 * HEADS * HEAD_DIM)
    table_ptr,  # ((2 TABLE_WINDOW - 1)^2, HEADS)
    weight_ptr,  # (2, HEAD_DIM), with QK_NORM
    out_ptr,  # (batch, height, width, HEADS * HEAD_DIM)
    num_windows,  # of the batch
    height,
    width,
    scale,  # head_dim^-0.5 log2(e)
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    TABLE_WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    D: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    SHIFTED: tl.constexpr = SHIFT_ROWS + SHIFT_COLUMNS > 0
    program = tl.program_id(0)
    head = program % HEADS
    chunks = tl.num_programs(0) // HEADS
    bias = _bias(table_ptr, head, HEADS, WINDOW_COLUMNS, TABLE_WINDOW, TOKENS, BLOCK_T)
    in_window = tl.arange(0, BLOCK_T) < TOKENS
    lane = tl.arange(0, BLOCK_D)
    mask = in_window[:, None] & (lane < HEAD_DIM)[None, :]
    channel = head * HEAD_DIM + lane
    q_weight, k_weight = _norm_weights(weight_ptr, lane, HEAD_DIM, QK_NORM)

    for window in range(program // HEADS, num_windows, chunks):
        batch, token, region = _window(
            window, height, width, WINDOW_ROWS, WINDOW_COLUMNS, SHIFT_ROWS, SHIFT_COLUMNS, BLOCK_T
        )
        q_ptrs = qkv_ptr + batch * (height * width * 3 * D) + (token[:, None] * (3 * D) + channel[None, :])
        q, _, _ = _load_normed(q_ptrs, mask, q_weight, eps, HEAD_DIM, QK_NORM)
        k, _, _ = _load_normed(q_ptrs + D, mask, k_weight, eps, HEAD_DIM, QK_NORM)
        v = tl.load(q_ptrs + 2 * D, mask=mask, other=0.0)
        p = _exp_logits(q, k, bias, region, scale, SHIFTED)
        out = tl.dot(p.to(v.dtype), v, input_precision="tf32x3") / tl.sum(p, axis=1)[:, None]
        out_ptrs = out_ptr + batch * (height * width * D) + (token[:, None] * D + channel[None, :])
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def window_attention_bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    qkv_ptr,  # (batch, height, width, 3 * HEADS * HEAD_DIM)
    table_ptr,  # ((2 TABLE_WINDOW - 1)^2, HEADS)
    weight_ptr,  # (2, HEAD_DIM), with QK_NORM
    dout_ptr,  # (batch, height, width, HEADS * HEAD_DIM)
    dqkv_ptr,  # (batch, height, width, 3 * HEADS * HEAD_DIM)
    dbias_ptr,  # (chunks, HEADS, BLOCK_T, BLOCK_T)
    dweight_ptr,  # (chunks, HEADS, 2, HEAD_DIM), with QK_NORM
    num_windows,  # of the batch
    height,
    width,
    scale,  # head_dim^-0.5 log2(e)
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    TABLE_WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    D: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    SHIFTED: tl.constexpr = SHIFT_ROWS + SHIFT_COLUMNS > 0
    program = tl.program_id(0)
    head = program % HEADS
    chunks = tl.num_programs(0) // HEADS
    bias = _bias(table_ptr, head, HEADS, WINDOW_COLUMNS, TABLE_WINDOW, TOKENS, BLOCK_T)
    dbias = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    dq_weight = tl.zeros((BLOCK_D,), tl.float32)
    dk_weight = tl.zeros((BLOCK_D,), tl.float32)
    in_window = tl.arange(0, BLOCK_T) < TOKENS
    lane = tl.arange(0, BLOCK_D)
    mask = in_window[:, None] & (lane < HEAD_DIM)[None, :]
    channel = head * HEAD_DIM + lane
    q_weight, k_weight = _norm_weights(weight_ptr, lane, HEAD_DIM, QK_NORM)

    for window in range(program // HEADS, num_windows, chunks):
        batch, token, region = _window(
            window, height, width, WINDOW_ROWS, WINDOW_COLUMNS, SHIFT_ROWS, SHIFT_COLUMNS, BLOCK_T
        )
        q_offsets = token[:, None] * (3 * D) + channel[None, :]
        q_ptrs = qkv_ptr + batch * (height * width * 3 * D) + q_offsets
        q, q_unit, q_r = _load_normed(q_ptrs, mask, q_weight, eps, HEAD_DIM, QK_NORM)
        k, k_unit, k_r = _load_normed(q_ptrs + D, mask, k_weight, eps, HEAD_DIM, QK_NORM)
        v = tl.load(q_ptrs + 2 * D, mask=mask, other=0.0)
        dout_ptrs = dout_ptr + batch * (height * width * D) + (token[:, None] * D + channel[None, :])
        dout = tl.load(dout_ptrs, mask=mask, other=0.0)

        p = _exp_logits(q, k, bias, region, scale, SHIFTED)
        p *= 1.0 / tl.sum(p, axis=1)[:, None]
        # Each gradient is stored as soon as it is there, to hold the registers of one at a time.
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="tf32x3")
        dq_ptrs = dqkv_ptr + batch * (height * width * 3 * D) + q_offsets
        tl.store(dq_ptrs + 2 * D, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)
        dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
        # Queries beyond the window have dout = 0, keys beyond it p = 0: neither adds anything.
        dlogits = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        dbias += dlogits
        dlogits *= scale * 0.6931471805599453  # back to head_dim^-0.5
        ds = dlogits.to(q.dtype)
        dq = tl.dot(ds, k, input_precision="tf32x3")
        if QK_NORM:
            dq_weight += tl.sum(dq * q_unit, axis=0)
            dq = _norm_grad(dq, q_weight, q_unit, q_r, HEAD_DIM)
        tl.store(dq_ptrs, dq.to(dqkv_ptr.dtype.element_ty), mask=mask)
        dk = tl.dot(tl.trans(ds), q, input_precision="tf32x3")
        if QK_NORM:
            dk_weight += tl.sum(dk * k_unit, axis=0)
            dk = _norm_grad(dk, k_weight, k_unit, k_r, HEAD_DIM)
        tl.store(dq_ptrs + D, dk.to(dqkv_ptr.dtype.element_ty), mask=mask)

    query = tl.arange(0, BLOCK_T)[:, None]
    key = tl.arange(0, BLOCK_T)[None, :]
    dbias_ptr += ((program // HEADS) * HEADS + head) * (BLOCK_T * BLOCK_T)
    tl.store(dbias_ptr + query * BLOCK_T + key, dbias)
    if QK_NORM:
        dweight_ptr += ((program // HEADS) * HEADS + head) * (2 * HEAD_DIM)
        tl.store(dweight_ptr + lane, dq_weight, mask=lane < HEAD_DIM)
        tl.store(dweight_ptr + HEAD_DIM + lane, dk_weight, mask=lane < HEAD_DIM)


@jit
def bias_grad_kernel(  # type: ignore[no-untyped-def]  # kernel
    dbias_ptr,  # (HEADS, BLOCK_T, BLOCK_T)
    dtable_ptr,  # ((2 TABLE_WINDOW - 1)^2, HEADS)
    HEADS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    TABLE_WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The gradient of ENTRIES rows of the table for one head: each sums over the queries of a window, whose
    key follows from the entry. Entries that no pair of a smaller window has get 0.
    """
    SIDE: tl.constexpr = 2 * TABLE_WINDOW - 1
    head = tl.program_id(0) % HEADS
    entry = (tl.program_id(0) // HEADS) * ENTRIES + tl.arange(0, ENTRIES)
    query = tl.arange(0, BLOCK_T)[None, :]
    key_row = query // WINDOW_COLUMNS - (entry // SIDE - (TABLE_WINDOW - 1))[:, None]
    key_column = query % WINDOW_COLUMNS - (entry % SIDE - (TABLE_WINDOW - 1))[:, None]
    pair = (query < WINDOW_ROWS * WINDOW_COLUMNS) & (key_row >= 0) & (key_row < WINDOW_ROWS)
    pair = pair & (key_column >= 0) & (key_column < WINDOW_COLUMNS)
    offsets = (head * BLOCK_T + query) * BLOCK_T + key_row * WINDOW_COLUMNS + key_column
    dbias = tl.load(dbias_ptr + offsets, mask=pair, other=0.0)
    tl.store(dtable_ptr + entry * HEADS + head, tl.sum(dbias, axis=1), mask=entry < SIDE * SIDE)
