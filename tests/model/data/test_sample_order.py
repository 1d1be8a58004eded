"""If these fail, an epoch shows some images twice and others never, or a resumed run sees another order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from model.data.sample_order import shuffled

IMAGENET = 1_281_167


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 127, 1000, 4097])
def test_shuffled_shows_every_image_once_an_epoch(size: int) -> None:
    positions, _ = shuffled(np.arange(3 * size), size, seed=5)
    for epoch in positions.reshape(3, size):
        assert np.array_equal(np.sort(epoch), np.arange(size))


def test_shuffled_covers_imagenet() -> None:
    positions, flips = shuffled(np.arange(7 * IMAGENET, 8 * IMAGENET), IMAGENET, seed=0)
    assert np.array_equal(np.bincount(positions), np.ones(IMAGENET))
    assert abs(flips.mean() - 0.5) < 0.002  # 4.5 standard deviations
    assert abs(np.corrcoef(positions, np.arange(IMAGENET))[0, 1]) < 0.004
    assert abs(np.corrcoef(positions[1:], positions[:-1])[0, 1]) < 0.004


def test_shuffled_is_a_function_of_each_sample_alone() -> None:
    """So batches, processes and interruptions may fall anywhere."""
    samples = np.arange(10_000)
    positions, flips = shuffled(samples, 300, seed=1)
    asked = np.random.default_rng(0).permutation(samples)
    some_positions, some_flips = shuffled(asked, 300, seed=1)
    assert np.array_equal(some_positions, positions[asked])
    assert np.array_equal(some_flips, flips[asked])
    far, _ = shuffled(np.array([2**62]), 300, seed=2**62)
    assert 0 <= far[0] < 300


def test_shuffled_shows_both_flips_of_an_image_in_two_epochs() -> None:
    positions, flips = shuffled(np.arange(4 * 100), 100, seed=3)
    by_position = np.empty((4, 100), bool)
    for epoch in range(4):
        by_position[epoch, positions.reshape(4, 100)[epoch]] = flips.reshape(4, 100)[epoch]
    assert np.array_equal(by_position[0], ~by_position[1])
    assert np.array_equal(by_position[2], ~by_position[3])
    assert 20 < (by_position[0] == by_position[2]).sum() < 80


def test_shuffled_orders_are_equally_likely() -> None:
    """Epochs and seeds have orders of their own; all 24 of four images come up, each 1/24 of the time."""
    for orders in (
        [tuple(order) for order in shuffled(np.arange(4 * 12_000), 4, seed=0)[0].reshape(-1, 4)],
        [tuple(shuffled(np.arange(4), 4, seed)[0]) for seed in range(1_500)],
    ):
        counts = Counter(orders)
        expected = len(orders) / 24
        assert len(counts) == 24
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 55  # chi2, p = 2e-4


@pytest.mark.parametrize(
    ("samples", "size", "seed", "message"),
    [([0], 0, 0, "size, seed: 0, 0 given"), ([0], 1, -1, "1, -1 given"), ([-1], 1, 0, "sample_indices: -1")],
    ids=["empty", "negative-seed", "negative-sample"],
)
def test_shuffled_refuses(samples: list[int], size: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shuffled(np.array(samples), size, seed)
