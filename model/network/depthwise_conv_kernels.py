"""The depthwise convolution's Triton kernels, forward and backward; `depthwise_conv.py` launches them.

Per channel, with zeros around the grid:

    pre[r, c] = bias + sum over i, j of weight[i, j] u[r + i - 1, c + j - 1],   out = SiLU(pre)

All of it is bound by memory: a kernel reads u where the projection left it, tokens TOKEN numbers apart, and
moves each of its numbers once, but for the edges that neighbours share through the caches.

A strip is COLUMNS columns by `rows` rows of a grid, for one channel. A thread has 4 channels of one strip and
walks down its rows. It loads COLUMNS + 2 tokens of a row, 4 channels each, widens them to fp32 once and adds
them to the three output rows that they touch: two of these are carried along as partial sums, the third is
finished and stored. The next row is fetched meanwhile. The 9 weights of a channel, in registers, serve
COLUMNS tokens at a time: more columns a thread mean more bytes under way for the same registers.

A program has BLOCK_C channels of STRIPS strips, neighbours along the row, then down the grid, then in the
next row of the batch: any grid fills it. The programs of the same strips and other channels come next.

The backward keeps nothing of the forward but u and makes two passes. The first computes pre again, from three
rows of u, and writes dpre = dout SiLU'(pre); it adds up dpre u for each weight in registers and writes one
partial sum a program, for torch to sum up. So nothing is accumulated atomically, and results do not vary
between runs. The second is the forward kernel, without SiLU and with the weights turned by half a turn.
"""

from __future__ import annotations

from functools import partial

from model.network import triton_jit
from model.network.triton_jit import tl

# What follows from the batch and the size of the image: a kernel compiled for one must serve them all.
jit = partial(triton_jit.jit, do_not_specialize=["num_strips", "height", "width", "rows"])

# A kernel's parameters are Triton's (pointers, integers, tiles): they have no Python type to annotate. Its
# tuples hold several tokens or taps of a thread and grow in loops that the compiler unrolls; mypy takes the
# empty one that they begin with for their type.
# mypy: disable-error-code="assignment, operator"


@jit
def _strips(first, num_strips, height, width, rows, COLUMNS: tl.constexpr, STRIPS: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """Of STRIPS strips from `first` on: the first row and column, that token in the batch, whether it is."""
    strip = first + tl.arange(0, STRIPS)
    across, down = (width + COLUMNS - 1) // COLUMNS, (height + rows - 1) // rows
    row = (strip // across % down) * rows
    column = (strip % across) * COLUMNS
    batch = strip // (across * down)
    return row, column, (batch.to(tl.int64) * height + row) * width + column, strip < num_strips


@jit
def _load(ptrs, row, column, end, width, mask, TOKEN: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """COUNT tokens of a row from the strip's column FIRST on, each (STRIPS, BLOCK_C); zeros around the grid
    and from row `end` on.
    """
    tokens = ()
    in_rows = (row >= 0) & (row < end)
    for j in tl.static_range(FIRST, FIRST + COUNT):
        in_grid = in_rows & (column + j >= 0) & (column + j < width)
        tokens += (tl.load(ptrs + j * TOKEN, mask=mask & in_grid[:, None], other=0.0),)
    return tokens


@jit
def _widen(tokens):  # type: ignore[no-untyped-def]  # kernel
    wide = ()
    for j in tl.static_range(len(tokens)):
        wide += (tokens[j].to(tl.float32),)
    return wide


@jit
def _load_weights(weight_ptr, channel, D: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """The 9 weights of each channel, (1, BLOCK_C) each, in reading order or, TURNED, against it."""
    weights = ()
    for tap in tl.static_range(9):
        place = channel * 9 + (8 - tap if TURNED else tap)
        weights += (tl.load(weight_ptr + place, mask=channel < D, other=0.0).to(tl.float32)[None, :],)
    return weights


@jit
def _sigmoid(x):  # type: ignore[no-untyped-def]  # kernel
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@jit
def conv3x3_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,  # (batch, height, width, D), tokens TOKEN apart
    weight_ptr,  # (D, 1, 3, 3)
    bias_ptr,  # (D,), or anything if not HAS_BIAS
    out_ptr,  # (batch, height, width, D), contiguous
    num_strips,  # of the batch
    height,
    width,
    rows,  # of a strip
    D: tl.constexpr,
    TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    TURNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """SiLU or nothing of the convolution with the weights or, TURNED, of the correlation that undoes it."""
    BLOCKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    block, group = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first_row, column, token, exists = _strips(
        group * STRIPS, num_strips, height, width, rows, COLUMNS, STRIPS
    )
    mask = exists[:, None] & (channel < D)[None, :]
    row = first_row - 1  # of u; its output row is one above
    end = tl.minimum(first_row + (rows + 1), height)
    u_ptrs = u_ptr + (token - width)[:, None] * TOKEN + channel[None, :]
    out_ptrs = out_ptr + (token - 2 * width)[:, None] * D + channel[None, :]

    tokens = _load(u_ptrs, row, column, end, width, mask, TOKEN, -1, COLUMNS + 2)
    w = _load_weights(weight_ptr, channel, D, TURNED)
    bias = tl.zeros((STRIPS, BLOCK_C), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    above = (bias,) * COLUMNS
    here = (bias,) * COLUMNS
    for step in range(rows + 2):
        u = _widen(tokens)
        row += 1
        u_ptrs += width * TOKEN
        tokens = _load(u_ptrs, row, column, end, width, mask, TOKEN, -1, COLUMNS + 2)
        next_above = ()
        next_here = ()
        for j in tl.static_range(COLUMNS):
            out = above[j] + w[6] * u[j] + w[7] * u[j + 1] + w[8] * u[j + 2]
            next_above += (here[j] + w[3] * u[j] + w[4] * u[j + 1] + w[5] * u[j + 2],)
            next_here += (bias + w[0] * u[j] + w[1] * u[j + 1] + w[2] * u[j + 2],)
            if SILU:
                out *= _sigmoid(out)
            in_grid = (step >= 2) & (row <= height + 1) & (column + j < width)
            tl.store(out_ptrs + j * D, out.to(out_ptr.dtype.element_ty), mask=mask & in_grid[:, None])
        above = next_above
        here = next_here
        out_ptrs += width * D


@jit
def conv3x3_silu_bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    u_ptr,  # (batch, height, width, D), tokens TOKEN apart
    weight_ptr,  # (D, 1, 3, 3)
    bias_ptr,  # (D,), or anything if not HAS_BIAS
    dout_ptr,  # (batch, height, width, D), contiguous
    dpre_ptr,  # (batch, height, width, D), contiguous
    sums_ptr,  # (groups, 9 + HAS_BIAS, D)
    num_strips,  # of the batch
    height,
    width,
    rows,  # of a strip
    D: tl.constexpr,
    TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dpre, and the sums for dweight and dbias over the strips of a program: every `groups`-th STRIPS."""
    BLOCKS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    block, group = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    groups = tl.num_programs(0) // BLOCKS
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    w = _load_weights(weight_ptr, channel, D, False)
    bias = tl.zeros((1, BLOCK_C), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    zero = tl.zeros((STRIPS, BLOCK_C), tl.float32)
    dbias = zero
    dw = (zero,) * 9

    for first in range(group * STRIPS, num_strips, groups * STRIPS):
        row, column, token, exists = _strips(first, num_strips, height, width, rows, COLUMNS, STRIPS)
        mask = exists[:, None] & (channel < D)[None, :]
        end = tl.minimum(row + rows, height)
        u_ptrs = u_ptr + token[:, None] * TOKEN + channel[None, :]
        dout_ptrs = dout_ptr + token[:, None] * D + channel[None, :]
        dpre_ptrs = dpre_ptr + token[:, None] * D + channel[None, :]
        u0 = _widen(
            _load(u_ptrs - width * TOKEN, row - 1, column, height, width, mask, TOKEN, -1, COLUMNS + 2)
        )
        u1 = _widen(_load(u_ptrs, row, column, height, width, mask, TOKEN, -1, COLUMNS + 2))
        u_ptrs += width * TOKEN
        below = _load(u_ptrs, row + 1, column, height, width, mask, TOKEN, -1, COLUMNS + 2)
        dout = _load(dout_ptrs, row, column, end, width, mask, D, 0, COLUMNS)
        for _ in range(rows):
            u2 = _widen(below)
            gradient = _widen(dout)
            row += 1
            u_ptrs += width * TOKEN
            dout_ptrs += width * D
            below = _load(
                u_ptrs, row + 1, column, tl.minimum(end + 1, height), width, mask, TOKEN, -1, COLUMNS + 2
            )
            dout = _load(dout_ptrs, row, column, end, width, mask, D, 0, COLUMNS)
            for j in tl.static_range(COLUMNS):
                taps = u0[j : j + 3] + u1[j : j + 3] + u2[j : j + 3]
                pre = bias
                for tap in tl.static_range(9):
                    pre += w[tap] * taps[tap]
                sigmoid = _sigmoid(pre)
                # Beyond the grid dout is 0, and so is what it adds.
                dpre = gradient[j] * (sigmoid + pre * (sigmoid - sigmoid * sigmoid))
                dbias += dpre
                sums = ()
                for tap in tl.static_range(9):
                    sums += (dw[tap] + dpre * taps[tap],)
                dw = sums
                in_grid = (row <= height) & (column + j < width)
                tl.store(dpre_ptrs + j * D, dpre.to(dpre_ptr.dtype.element_ty), mask=mask & in_grid[:, None])
            dpre_ptrs += width * D
            u0 = u1
            u1 = u2

    sums_ptr += group * ((9 + HAS_BIAS) * D) + channel
    for tap in tl.static_range(9):
        tl.store(sums_ptr + tap * D, tl.sum(dw[tap], axis=0), mask=channel < D)
    if HAS_BIAS:
        tl.store(sums_ptr + 9 * D, tl.sum(dbias, axis=0), mask=channel < D)
