"""The Triton kernel of `noise.gaussian_noise`: an image's noise in one launch, beside that readable reference
of some 200.

Letters as there: Philox4x32-10 of the counter (block of four words, draw, image index) under the seed, then
Box-Muller in float64.
"""

from __future__ import annotations

from model.network.triton_jit import jit, tl

__all__ = ["gaussian_noise_kernel"]


@jit
def gaussian_noise_kernel(  # type: ignore[no-untyped-def]  # kernel
    seeds_ptr,  # (n,) int64, as the next two
    indices_ptr,
    draws_ptr,
    noise_ptr,  # (n, count) fp32
    count,  # numbers of an image
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,  # blocks of four words of a program
):
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, index = tl.load(seeds_ptr + image), tl.load(indices_ptr + image)
    draw = tl.load(draws_ptr + image)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = tl.zeros((BLOCK,), tl.uint32) + draw.to(tl.uint32)
    c2 = tl.zeros((BLOCK,), tl.uint32) + index.to(tl.uint32)
    c3 = tl.zeros((BLOCK,), tl.uint32) + (index >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        first, second = c0, c2
        c0 = tl.umulhi(second, 0xCD9E8D57) ^ c1 ^ key0
        c2 = tl.umulhi(first, 0xD2511F53) ^ c3 ^ key1
        c1 = second * 0xCD9E8D57
        c3 = first * 0xD2511F53
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85

    offsets = image * count + block.to(tl.int64) * 4
    left = count - block * 4  # numbers of the image from this block on
    radius0, angle0 = _polar(c0, c1)
    radius1, angle1 = _polar(c2, c3)
    tl.store(noise_ptr + offsets, (radius0 * tl.cos(angle0)).to(tl.float32), mask=left > 0)
    tl.store(noise_ptr + offsets + 1, (radius1 * tl.cos(angle1)).to(tl.float32), mask=left > 1)
    tl.store(noise_ptr + offsets + 2, (radius0 * tl.sin(angle0)).to(tl.float32), mask=left > 2)
    tl.store(noise_ptr + offsets + 3, (radius1 * tl.sin(angle1)).to(tl.float32), mask=left > 3)


@jit
def _polar(word0, word1):  # type: ignore[no-untyped-def]  # kernel
    """Radius and angle, fp64, of two words: a half is added, so that the logarithm is finite."""
    radius = tl.sqrt(-2.0 * tl.log((word0.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    return radius, (word1.to(tl.float64) + 0.5) * 1.4629180792671596e-09
