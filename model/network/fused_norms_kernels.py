"""Triton kernels of LayerNorm and what stands around it, forward alone; `fused_norms.py` launches them.

Each token is read once and written once: its channels stay in registers while mean, variance and result are
computed, all in fp32 and in this order (the variance is of differences from the mean, so a mean far from 0
costs no digits).

A program has TOKENS tokens, whose D channels it cuts into tiles of TOKENS x CHUNK. CHUNK is a power of two, D
any number: a width of 320 is five tiles of 64, where one of 512 would idle at 37 % of its channels. A tile
has 8 channels a thread, one load of 16 bytes in the half precisions. Vectors that are the same for many
tokens (weights, AdaLN vectors) are read again for each: the cache of the multiprocessor has them.

All loads stand before the first store: a compiler cannot know that they do not overlap, and would make each
tile wait for the one before.
"""

from __future__ import annotations

from functools import partial

from model.network import triton_jit
from model.network.triton_jit import tl

# They grow with the batch and the grid: a kernel compiled for one size must serve them all.
jit = partial(triton_jit.jit, do_not_specialize=["num_tokens", "tokens_a_row", "columns"])

# A kernel's parameters are Triton's (pointers, integers, tiles): they have no Python type to annotate.


@jit
def _with(tiles, tile):  # type: ignore[no-untyped-def]  # kernel
    return tiles + (tile,)  # noqa: RUF005  # Triton unpacks no tuples


@jit
def _load(  # type: ignore[no-untyped-def]  # kernel
    ptr, start, live, D: tl.constexpr, CHUNK: tl.constexpr
):
    """The D numbers from `start (TOKENS, 1)` on as a tuple of fp32 tiles; 0 beyond them."""
    tiles = ()
    for first in tl.static_range(0, D, CHUNK):
        channel = first + tl.arange(0, CHUNK)[None, :]
        tile = tl.load(ptr + start + channel, mask=live & (channel < D), other=0.0)
        tiles = _with(tiles, tile.to(tl.float32))
    return tiles


@jit
def _store(  # type: ignore[no-untyped-def]  # kernel
    ptr, start, live, tiles, D: tl.constexpr, CHUNK: tl.constexpr
):
    """The inverse of `_load`, in the dtype of `ptr`."""
    for i in tl.static_range(len(tiles)):
        channel = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        tl.store(ptr + start + channel, tiles[i].to(ptr.dtype.element_ty), mask=live & (channel < D))


@jit
def _normalized(  # type: ignore[no-untyped-def]  # kernel
    tiles, weight_ptr, bias_ptr, start, live, eps, D: tl.constexpr, CHUNK: tl.constexpr
):
    """LayerNorm of each token; `start`: 0 for each."""
    if weight_ptr is not None:
        weights = _load(weight_ptr, start, live, D, CHUNK)
        biases = _load(bias_ptr, start, live, D, CHUNK)
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    mean = tl.sum(total, axis=1)[:, None] / D
    squares = tl.zeros(total.shape, tl.float32)
    for i in tl.static_range(len(tiles)):
        difference = tiles[i] - mean
        if D % CHUNK != 0:
            difference = tl.where(i * CHUNK + tl.arange(0, CHUNK)[None, :] < D, difference, 0.0)
        squares += difference * difference
    deviation = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / D + eps)
    normalized = ()
    for i in tl.static_range(len(tiles)):
        tile = (tiles[i] - mean) * deviation
        if weight_ptr is not None:
            tile = tile * weights[i] + biases[i]
        normalized = _with(normalized, tile)
    return normalized


@jit
def residual_norm_kernel(  # type: ignore[no-untyped-def]  # kernel
    x_ptr,  # (num_tokens, D)
    branch_ptr,  # (num_tokens, D) or None
    gate_ptr,  # (batch, D), rows VECTORS apart, like shift and scale
    weight_ptr,  # (D,) or None, like bias
    bias_ptr,
    shift_ptr,
    scale_ptr,
    sum_ptr,  # (num_tokens, D): x + gate * branch
    out_ptr,  # (num_tokens, D)
    num_tokens,
    tokens_a_row,  # of the batch
    vectors_stride,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = token < num_tokens
    start = token.to(tl.int64) * D
    vector = (token // tokens_a_row).to(tl.int64) * vectors_stride
    tiles = _load(x_ptr, start, live, D, CHUNK)
    if branch_ptr is not None:
        branches = _load(branch_ptr, start, live, D, CHUNK)
        gates = _load(gate_ptr, vector, live, D, CHUNK)
    scales = _load(scale_ptr, vector, live, D, CHUNK)
    shifts = _load(shift_ptr, vector, live, D, CHUNK)
    if branch_ptr is not None:
        sums = ()
        for i in tl.static_range(len(tiles)):
            sums = _with(sums, tiles[i] + gates[i] * branches[i])
        tiles = sums
    normalized = _normalized(tiles, weight_ptr, bias_ptr, token * 0, live, eps, D, CHUNK)
    out = ()
    for i in tl.static_range(len(tiles)):
        out = _with(out, normalized[i] * (1 + scales[i]) + shifts[i])
    if branch_ptr is not None:
        _store(sum_ptr, start, live, tiles, D, CHUNK)
    _store(out_ptr, start, live, out, D, CHUNK)


@jit
def gated_norm_kernel(  # type: ignore[no-untyped-def]  # kernel
    y_ptr,  # (num_tokens, GROUPS, D)
    z_ptr,  # (num_tokens, D), rows z_stride apart
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (num_tokens, D)
    num_tokens,
    z_stride,
    eps,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = token < num_tokens
    start = token.to(tl.int64) * D
    tiles = _load(y_ptr, start * GROUPS, live, D, CHUNK)
    for group in tl.static_range(1, GROUPS):
        others = _load(y_ptr, start * GROUPS + group * D, live, D, CHUNK)
        sums = ()
        for i in tl.static_range(len(tiles)):
            sums = _with(sums, tiles[i] + others[i])
        tiles = sums
    gates = _load(z_ptr, token.to(tl.int64) * z_stride, live, D, CHUNK)
    normalized = _normalized(tiles, weight_ptr, bias_ptr, token * 0, live, eps, D, CHUNK)
    out = ()
    for i in tl.static_range(len(tiles)):
        silu = gates[i] / (1 + tl.exp(-gates[i]))
        out = _with(out, normalized[i] * silu)
    _store(out_ptr, start, live, out, D, CHUNK)


@jit
def resampled_norm_kernel(  # type: ignore[no-untyped-def]  # kernel
    x_ptr,  # merged: (batch, 2 rows, 2 columns, D / 4); expanded: (batch, rows / F, columns / F, F * F * D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (batch, rows, columns, D)
    num_tokens,  # of the output
    columns,
    eps,
    MERGED: tl.constexpr,
    FACTOR: tl.constexpr,  # of the grid's sides
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = token < num_tokens
    row, column = (
        token // columns,
        token % columns,
    )  # rows of all images, each a multiple of FACTOR
    WIDTH: tl.constexpr = D // (FACTOR * FACTOR)  # of a token that is merged
    tiles = ()
    for first in tl.static_range(0, D, CHUNK):
        channel = first + tl.arange(0, CHUNK)[None, :]
        if MERGED:
            part = channel // WIDTH
            source = (FACTOR * row + part % FACTOR) * (FACTOR * columns) + FACTOR * column + part // FACTOR
            offset = source.to(tl.int64) * WIDTH + channel % WIDTH
        else:
            part = (row % FACTOR) * FACTOR + column % FACTOR
            source = (row // FACTOR) * (columns // FACTOR) + column // FACTOR
            offset = (source.to(tl.int64) * (FACTOR * FACTOR) + part) * D + channel
        tile = tl.load(x_ptr + offset, mask=live & (channel < D), other=0.0)
        tiles = _with(tiles, tile.to(tl.float32))
    normalized = _normalized(tiles, weight_ptr, bias_ptr, token * 0, live, eps, D, CHUNK)
    _store(out_ptr, token.to(tl.int64) * D, live, normalized, D, CHUNK)
