"""Random numbers that belong to an image: a counter-based generator, with no state to keep.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 64-bit key and
a 128-bit counter to 128 random bits. Here the key is the seed and the counter is (block of four words,
draw, stream), so each number is a pure function of (seed, stream, draw, element): it depends neither on the
batch, nor on the order of calls, nor on the device. Gaussians are made by Box-Muller in float64 and rounded
once, so that the last-place differences between the log, sin and cos of two devices disappear in the
rounding (all but about one value in 10^8, which then differs by one fp32 ulp).

Only element-wise operations on the device of `seeds`: no host synchronisation, no table in memory, capturable
in a CUDA graph, compilable without graph breaks. On CUDA, where Triton is, Gaussians are one launch
(`noise_kernels.py`) instead of some 200.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.diffusion import noise_kernels
from model.network.triton_jit import HAS_TRITON

__all__ = ["gaussian_noise", "philox4x32", "philox_uniform"]

_WORD = 0xFFFFFFFF
_WEYL = (0x9E3779B9, 0xBB67AE85)
# The two multipliers 0xD2511F53 and 0xCD9E8D57, less 2**32: a product with a 32-bit word then fits int64
# without overflow.
_MULTIPLIERS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
_ROUNDS = 10
_BLOCKS = 128
"""Of four words, of a program of the kernel."""


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter, as int64 in [0, 2**32).

    Words go in as int64 in [0, 2**32) too; the tensors broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c * (m + 2**32) = c * m + (c << 32): the low word is that of c * m, the high word is its high word
        # plus c.
        high0, high1 = (product0 >> 32) + c0, (product1 >> 32) + c2
        c0 = (high1 ^ c1 ^ (k0 + step * _WEYL[0])) & _WORD
        c2 = (high0 ^ c3 ^ (k1 + step * _WEYL[1])) & _WORD
        c1, c3 = product1 & _WORD, product0 & _WORD
    return c0, c1, c2, c3


def philox_uniform(seeds: Tensor, streams: Tensor, draws: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) with 53 random bits, for each of n generators: (n, count) float64.

    Args:
        seeds, streams: (n,) int64, at least 0; all 63 bits count.
        draws: (n,) int64 in [0, 2**32): the generator's draw-th set of numbers.
        count: numbers a draw, at most 2**33. The first numbers of a longer draw are those of a shorter one.
    """
    words = _words(seeds, streams, draws, num_blocks=-(-count // 2))  # (n, blocks, 4)
    high, low = words[..., 0::2] >> 5, words[..., 1::2] >> 6  # 27 and 26 bits
    uniform = (high * 2**26 + low).to(torch.float64) * 2.0**-53  # (n, blocks, 2)
    return uniform.flatten(1)[:, :count]


def gaussian_noise(
    seeds: Tensor, image_indices: Tensor, draws: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Standard normal noise of n images: (n, C, H, W) fp32 on the device of `seeds`.

    Args:
        seeds, image_indices: (n,) int64, at least 0: which image.
        draws: (n,) int64 in [0, 2**32): 0 is the image's initial latents, i + 1 the noise of its sampler
            step i.
        shape: (C, H, W).
    """
    count = math.prod(shape)
    if seeds.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        return _noise_by_kernel(seeds, image_indices, draws, count).reshape(-1, *shape)
    words = _words(seeds, image_indices, draws, num_blocks=-(-count // 4))  # (n, blocks, 4)
    uniform = (words.to(torch.float64) + 0.5) * 2.0**-32  # in (0, 1): the logarithm is finite
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))  # (n, blocks, 2)
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)  # (n, blocks, 4)
    return normal.to(torch.float32).flatten(1)[:, :count].reshape(-1, *shape)


def _noise_by_kernel(seeds: Tensor, image_indices: Tensor, draws: Tensor, count: int) -> Tensor:
    """`gaussian_noise` as (n, count)."""
    noise = torch.empty(len(seeds), count, device=seeds.device)
    if noise.numel():
        blocks = -(-count // 4)
        noise_kernels.gaussian_noise_kernel[len(seeds), -(-blocks // _BLOCKS)](
            *(numbers.contiguous() for numbers in (seeds, image_indices, draws)),
            noise,
            count,
            ROUNDS=_ROUNDS,
            BLOCK=_BLOCKS,
        )
    return noise


def _words(seeds: Tensor, streams: Tensor, draws: Tensor, num_blocks: int) -> Tensor:
    """Random words (n, num_blocks, 4) int64 of each generator's draw."""
    seeds, streams, draws = seeds[:, None], streams[:, None], draws[:, None]  # (n, 1)
    # The mask changes no value: it keeps compilers from merging the range into the first multiplication, as
    # an index computed in 32 bits, where it would overflow.
    block = torch.arange(num_blocks, device=seeds.device)[None] & _WORD  # (1, blocks)
    counter = (block, draws & _WORD, streams & _WORD, streams >> 32)
    return torch.stack(philox4x32(counter, (seeds & _WORD, seeds >> 32)), dim=-1)
