"""Triton kernels of LayerNorm and what stands around it; `fused_norms.py` launches them.

Each token is read once and written once: its channels stay in registers while mean, variance and result are
computed, all in fp32 and in this order (the variance is of differences from the mean, so a mean far from 0
costs no digits).

A program has TOKENS tokens, whose D channels it cuts into tiles of TOKENS x CHUNK. CHUNK is a power of two, D
any number: a width of 320 is five tiles of 64, where one of 512 would idle at 37 % of its channels. Forward,
a tile has one load of 16 bytes a thread, 8 channels of the half precisions. Vectors that are the same for
many tokens (weights, AdaLN vectors) are read again for each: the cache of the multiprocessor has them.

All loads stand before the first store: a compiler cannot know that they do not overlap, and would make each
tile wait for the one before.

Backward, with n the standardised numbers, w the weight and g = dL/d(n w + b): dL/dx of a token is
deviation * (h - mean(h) - n mean(h n)) for h = g w. It needs its token alone, but the gradients of weight,
bias and AdaLN vectors are sums over tokens. So a program takes a run of tokens, a few at a time, and keeps
those sums in registers: x is read once for both, mean and deviation are computed again, and what programs
found is left to add. It has fewer channels a thread, since the sums stay beside what it reads.
"""

from __future__ import annotations

from functools import partial

from model.network import triton_jit
from model.network.triton_jit import tl

# They grow with the batch and the grid: a kernel compiled for one size must serve them all.
jit = partial(
    triton_jit.jit, do_not_specialize=["num_tokens", "tokens_a_row", "tokens_a_part", "parts", "columns"]
)

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
def _mean(tiles, D: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """Of each token, where the tiles are 0 beyond D."""
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    return tl.sum(total, axis=1)[:, None] / D


@jit
def _standardised(tiles, eps, D: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """Each token with mean 0 and deviation 1, any number beyond D; and what it was multiplied by for that."""
    mean = _mean(tiles, D)
    squares = tl.zeros(tiles[0].shape, tl.float32)
    for i in tl.static_range(len(tiles)):
        difference = tiles[i] - mean
        if D % CHUNK != 0:
            difference = tl.where(i * CHUNK + tl.arange(0, CHUNK)[None, :] < D, difference, 0.0)
        squares += difference * difference
    deviation = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / D + eps)
    standardised = ()
    for i in tl.static_range(len(tiles)):
        standardised = _with(standardised, (tiles[i] - mean) * deviation)
    return standardised, deviation


@jit
def _through_norm(  # type: ignore[no-untyped-def]  # kernel
    gradients, standardised, deviation, D: tl.constexpr
):
    """Gradients of standardised tokens, 0 beyond D, to those of the tokens."""
    products = ()
    for i in tl.static_range(len(gradients)):
        products = _with(products, gradients[i] * standardised[i])
    mean, slope = _mean(gradients, D), _mean(products, D)
    through = ()
    for i in tl.static_range(len(gradients)):
        through = _with(through, deviation * (gradients[i] - mean - standardised[i] * slope))
    return through


@jit
def _zeros(D: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    tiles = ()
    for _ in tl.static_range(0, D, CHUNK):
        tiles = _with(tiles, tl.zeros((TOKENS, CHUNK), tl.float32))
    return tiles


@jit
def _store_sums(ptr, tiles, D: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # kernel
    """Those over the tokens, `(D,)`."""
    for i in tl.static_range(len(tiles)):
        channel = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(ptr + channel, tl.sum(tiles[i], axis=0), mask=channel < D)


@jit
def _normalized(  # type: ignore[no-untyped-def]  # kernel
    tiles, weight_ptr, bias_ptr, start, live, eps, D: tl.constexpr, CHUNK: tl.constexpr
):
    """LayerNorm of each token; `start`: 0 for each."""
    if weight_ptr is not None:
        weights = _load(weight_ptr, start, live, D, CHUNK)
        biases = _load(bias_ptr, start, live, D, CHUNK)
    standardised, _ = _standardised(tiles, eps, D, CHUNK)
    normalized = ()
    for i in tl.static_range(len(tiles)):
        tile = standardised[i]
        if weight_ptr is not None:
            tile = tile * weights[i] + biases[i]
        normalized = _with(normalized, tile)
    return normalized


@jit
def residual_norm_kernel(  # type: ignore[no-untyped-def]  # kernel
    x_ptr,  # (num_tokens, D)
    branch_ptr,  # (num_tokens, D) or None
    gate_ptr,  # (batch, D), rows vectors_stride apart, like shift and scale
    weight_ptr,  # (D,) or None, like bias
    bias_ptr,
    shift_ptr,
    scale_ptr,
    sum_ptr,  # (num_tokens, D): x + gate * branch
    out_ptr,  # (num_tokens, D), or None, like shift and scale
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
    if out_ptr is not None:
        scales = _load(scale_ptr, vector, live, D, CHUNK)
        shifts = _load(shift_ptr, vector, live, D, CHUNK)
    if branch_ptr is not None:
        sums = ()
        for i in tl.static_range(len(tiles)):
            sums = _with(sums, tiles[i] + gates[i] * branches[i])
        tiles = sums
    if out_ptr is not None:
        normalized = _normalized(tiles, weight_ptr, bias_ptr, token * 0, live, eps, D, CHUNK)
        out = ()
        for i in tl.static_range(len(tiles)):
            out = _with(out, normalized[i] * (1 + scales[i]) + shifts[i])
    if branch_ptr is not None:
        _store(sum_ptr, start, live, tiles, D, CHUNK)
    if out_ptr is not None:
        _store(out_ptr, start, live, out, D, CHUNK)


@jit
def residual_norm_bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    sum_ptr,  # (num_tokens, D): x + gate * branch, as it was stored; None without dout
    branch_ptr,  # (num_tokens, D) or None, like gate and dbranch
    gate_ptr,  # (batch, D), rows vectors_stride apart, like scale
    weight_ptr,  # (D,) or None
    scale_ptr,
    dsum_ptr,  # (num_tokens, D) or None: of the sum beside its norm
    dout_ptr,  # (num_tokens, D), of the norm; or None, like dx, which then is dsum
    dx_ptr,  # (num_tokens, D)
    dbranch_ptr,  # (num_tokens, D)
    sums_ptr,  # (batch, parts, SUMS, D), fp32: of dout, of dout * standardised sum; of dx * branch
    tokens_a_row,  # of the batch
    tokens_a_part,
    parts,  # of a row of the batch
    vectors_stride,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,  # how many tiles are under way
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    lane = tl.arange(0, TOKENS)[:, None]
    vector = row * vectors_stride + lane * 0
    out_sums, norm_sums = _zeros(D, CHUNK, TOKENS), _zeros(D, CHUNK, TOKENS)
    gate_sums = _zeros(D, CHUNK, TOKENS)
    end = tl.minimum((part + 1) * tokens_a_part, tokens_a_row)
    for first in tl.range(part * tokens_a_part, end, TOKENS, num_stages=STAGES):
        token = first + lane
        live = token < end
        start = (row * tokens_a_row + token) * D
        if dsum_ptr is not None:
            dx = _load(dsum_ptr, start, live, D, CHUNK)
        if branch_ptr is not None:
            branches = _load(branch_ptr, start, live, D, CHUNK)
            gates = _load(gate_ptr, vector, live, D, CHUNK)
        if dout_ptr is not None:
            tiles = _load(sum_ptr, start, live, D, CHUNK)
            gradients = _load(dout_ptr, start, live, D, CHUNK)
            scales = _load(scale_ptr, vector, live, D, CHUNK)
            if weight_ptr is not None:
                weights = _load(weight_ptr, lane * 0, live, D, CHUNK)
            standardised, deviation = _standardised(tiles, eps, D, CHUNK)
            dstandardised, out_added, norm_added = (), (), ()
            for i in tl.static_range(len(tiles)):
                gradient = gradients[i] * (1 + scales[i])
                if weight_ptr is not None:
                    gradient *= weights[i]
                dstandardised = _with(dstandardised, gradient)
                out_added = _with(out_added, out_sums[i] + gradients[i])
                norm_added = _with(norm_added, norm_sums[i] + gradients[i] * standardised[i])
            out_sums, norm_sums = out_added, norm_added
            through = _through_norm(dstandardised, standardised, deviation, D)
            if dsum_ptr is not None:
                added = ()
                for i in tl.static_range(len(tiles)):
                    added = _with(added, dx[i] + through[i])
                dx = added
            else:
                dx = through
            _store(dx_ptr, start, live, dx, D, CHUNK)
        if branch_ptr is not None:
            dbranch, gate_added = (), ()
            for i in tl.static_range(len(dx)):
                dbranch = _with(dbranch, dx[i] * gates[i])
                gate_added = _with(gate_added, gate_sums[i] + dx[i] * branches[i])
            gate_sums = gate_added
            _store(dbranch_ptr, start, live, dbranch, D, CHUNK)
    sums_ptr += (row * parts + part) * (SUMS * D)
    if dout_ptr is not None:
        _store_sums(sums_ptr, out_sums, D, CHUNK)
        _store_sums(sums_ptr + D, norm_sums, D, CHUNK)
    if branch_ptr is not None:
        _store_sums(sums_ptr + (SUMS - 1) * D, gate_sums, D, CHUNK)


@jit
def gated_norm_kernel(  # type: ignore[no-untyped-def]  # kernel
    y_ptr,  # (num_tokens, GROUPS, D)
    z_ptr,  # (num_tokens, D), rows z_stride apart
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (num_tokens, D)
    sum_ptr,  # (num_tokens, D), of y over the groups, or None
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
    if sum_ptr is not None:
        _store(sum_ptr, start, live, tiles, D, CHUNK)
    _store(out_ptr, start, live, out, D, CHUNK)


@jit
def gated_norm_bwd_kernel(  # type: ignore[no-untyped-def]  # kernel
    y_ptr,  # (num_tokens, D): summed over the groups
    z_ptr,  # (num_tokens, D), rows z_stride apart
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    dout_ptr,  # (num_tokens, D)
    dy_ptr,  # (num_tokens, D)
    dz_ptr,  # (num_tokens, D)
    sums_ptr,  # (parts, 2, D), fp32: gradients of weight and bias
    num_tokens,
    tokens_a_part,
    z_stride,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,  # how many tiles are under way
):
    part = tl.program_id(0)
    lane = tl.arange(0, TOKENS)[:, None]
    weight_sums, bias_sums = _zeros(D, CHUNK, TOKENS), _zeros(D, CHUNK, TOKENS)
    end = tl.minimum((part + 1) * tokens_a_part, num_tokens)
    for first in tl.range(part * tokens_a_part, end, TOKENS, num_stages=STAGES):
        token = first + lane
        live = token < end
        start = token.to(tl.int64) * D
        tiles = _load(y_ptr, start, live, D, CHUNK)
        gates = _load(z_ptr, token.to(tl.int64) * z_stride, live, D, CHUNK)
        gradients = _load(dout_ptr, start, live, D, CHUNK)
        weights = _load(weight_ptr, lane * 0, live, D, CHUNK)
        biases = _load(bias_ptr, lane * 0, live, D, CHUNK)
        standardised, deviation = _standardised(tiles, eps, D, CHUNK)
        dstandardised, dz, weight_added, bias_added = (), (), (), ()
        for i in tl.static_range(len(tiles)):
            sigmoid = 1 / (1 + tl.exp(-gates[i]))
            silu = gates[i] * sigmoid
            normalized = standardised[i] * weights[i] + biases[i]
            dz = _with(dz, gradients[i] * normalized * (sigmoid + silu * (1 - sigmoid)))
            dnormalized = gradients[i] * silu
            dstandardised = _with(dstandardised, dnormalized * weights[i])
            weight_added = _with(weight_added, weight_sums[i] + dnormalized * standardised[i])
            bias_added = _with(bias_added, bias_sums[i] + dnormalized)
        weight_sums, bias_sums = weight_added, bias_added
        _store(dy_ptr, start, live, _through_norm(dstandardised, standardised, deviation, D), D, CHUNK)
        _store(dz_ptr, start, live, dz, D, CHUNK)
    sums_ptr += part.to(tl.int64) * (2 * D)
    _store_sums(sums_ptr, weight_sums, D, CHUNK)
    _store_sums(sums_ptr + D, bias_sums, D, CHUNK)


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
