"""Which image, and which of its flips, each sample of a training run shows: a pure function, without state.

Samples are counted over the whole run, g = 0, 1, 2, ...; epoch e = g // size holds each image exactly once,
in an order of its own. So the order depends neither on the number of processes, nor on the batch, nor on
where a run was interrupted, and it takes no memory, however large the data set.

The order within an epoch is a permutation of [0, size) by a Feistel network on the least number of bits that
holds size - 1: a bijection of [0, 2**bits), of which more than half lies below `size`. A result outside is
sent through again until it falls inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002), so that [0, size) is permuted within itself. The round function is the finalizer of
SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["shuffled"]

_ROUNDS = 8  # even: the halves, of unequal width where the bits are odd, then end where they began
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


def shuffled(
    sample_indices: NDArray[np.int64], size: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Positions (n,) int64 in [0, size), and flips (n,) bool, of the samples (n,) int64, at least 0.

    An image is shown as it is in one and mirrored in the other of epochs 2k and 2k + 1.
    """
    if size < 1 or seed < 0:
        raise ValueError(f"size, seed: {size}, {seed} given; 1 or more, 0 or more is accepted")
    samples = np.asarray(sample_indices, np.int64)
    if samples.size and samples.min() < 0:
        raise ValueError(f"sample_indices: {samples.min()} given; 0 or more is accepted")
    unsigned = samples.astype(np.uint64)
    epochs, indices = unsigned // np.uint64(size), unsigned % np.uint64(size)
    run_key = np.array([seed], np.uint64)
    positions = _permuted(indices, _mixed(_mixed(run_key) + epochs), size)
    flip_keys = _mixed(_mixed(run_key ^ _GOLDEN) + epochs // np.uint64(2))
    first_flips = _mixed(flip_keys ^ _mixed(positions)) & np.uint64(1)
    flips = (first_flips ^ (epochs & np.uint64(1))).astype(np.bool_)
    return positions.astype(np.int64), flips


def _permuted(indices: NDArray[np.uint64], keys: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Each index under the permutation of [0, size) that its key names."""
    bits = max(2, (size - 1).bit_length())
    values = _feistel(indices, keys, bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], bits)
        outside = outside[values[outside] >= size]
    return values


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for step in range(_ROUNDS):
        mixed = _mixed(_mixed(keys + np.uint64(step)) ^ right) & _mask(left_bits)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output for these states: a bijection of 64 bits without visible structure."""
    values = values + _GOLDEN  # modulo 2**64, as are the products
    for shift, factor in _MIX:
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> np.uint64(31))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
