"""If this fails, the same seed gives other images: alone or in a batch, on CPU or CUDA, now or later."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.diffusion import noise, noise_kernels
from model.diffusion.noise import gaussian_noise, philox4x32, philox_uniform
from tests.triton_interpreter import interpret_kernels

SHAPE = (4, 8, 8)
ONES = 0xFFFFFFFF
SEEDS = torch.tensor([0, 1, 2**32, 2**63 - 1])
INDICES = torch.tensor([0, 3, 2**40, 5])
DRAWS = torch.tensor([0, 1, 250, 1000])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with Random123
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox4x32_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    c0, c1, c2, c3 = torch.tensor(counter).unsqueeze(1)
    k0, k1 = torch.tensor(key).unsqueeze(1)
    assert torch.cat(philox4x32((c0, c1, c2, c3), (k0, k1))).tolist() == words


def _philox_by_arbitrary_precision(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & ONES, (first >> 32) ^ c[3] ^ k[1], first & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return c


def test_philox4x32_equals_arbitrary_precision_arithmetic() -> None:
    values = torch.randint(0, 2**32, (6, 50), generator=torch.Generator().manual_seed(0))
    c0, c1, c2, c3, k0, k1 = values
    words = torch.stack(philox4x32((c0, c1, c2, c3), (k0, k1)), dim=1).tolist()
    for column, result in zip(values.T.tolist(), words, strict=True):
        assert result == _philox_by_arbitrary_precision(column[:4], column[4:])


def test_gaussian_noise_counts_as_its_words_say() -> None:
    """The layout is a promise to stored seeds: key = seed, counter = (block, draw, image index)."""
    seed, index, draw, block = 2**40 + 7, 2**33 + 5, 12, 2
    word = _philox_by_arbitrary_precision([block, draw, 5, 2], [7, 2**8])
    first, second, third, fourth = ((w + 0.5) / 2**32 for w in word)
    expected = [
        math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second),
        math.sqrt(-2 * math.log(third)) * math.cos(2 * math.pi * fourth),
        math.sqrt(-2 * math.log(first)) * math.sin(2 * math.pi * second),
        math.sqrt(-2 * math.log(third)) * math.sin(2 * math.pi * fourth),
    ]
    noise = gaussian_noise(torch.tensor([seed]), torch.tensor([index]), torch.tensor([draw]), (1, 3, 4))
    torch.testing.assert_close(noise.flatten()[8:12], torch.tensor(expected), rtol=1e-7, atol=0)


def test_gaussian_noise_of_an_image_is_the_same_in_any_batch() -> None:
    together = gaussian_noise(SEEDS, INDICES, DRAWS, SHAPE)
    assert together.shape == (4, *SHAPE)
    assert together.dtype == torch.float32
    order = torch.tensor([2, 0, 3, 1])
    shuffled = gaussian_noise(SEEDS[order], INDICES[order], DRAWS[order], SHAPE)
    assert torch.equal(shuffled, together[order])
    for i in range(4):
        alone = gaussian_noise(SEEDS[i : i + 1], INDICES[i : i + 1], DRAWS[i : i + 1], SHAPE)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize(
    ("changed", "bit"),
    [
        *((name, bit) for name in ("seed", "image index") for bit in (0, 31, 32, 62)),
        ("draw", 0),
        ("draw", 31),
    ],
)
def test_gaussian_noise_is_independent_between_images_and_draws(changed: str, bit: int) -> None:
    key = torch.zeros(3, 2, dtype=torch.int64)
    key[["seed", "image index", "draw"].index(changed), 1] = 1 << bit
    a, b = gaussian_noise(key[0], key[1], key[2], (4, 32, 32)).flatten(1)
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(len(a))  # five standard deviations


def test_gaussian_noise_is_standard_normal() -> None:
    images = torch.arange(64)
    zeros = torch.zeros_like(images)
    z = gaussian_noise(zeros + 20, images, zeros, (4, 32, 32)).double()
    n = z.numel()
    expected = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0)}  # moment: (mean, variance)
    for moment, (mean, variance) in expected.items():
        assert abs((z**moment).mean().item() - mean) < 5 * math.sqrt(variance / n), moment
    flat = z.flatten(1)
    for lag in (1, 2, 3, 4, 32):
        product = (flat[:, lag:] * flat[:, :-lag]).mean().item()
        assert abs(product) < 5 / math.sqrt(n - 64 * lag), lag
    # Kolmogorov-Smirnov: the distribution as a whole, not its moments alone
    cdf = torch.special.ndtr(z.flatten().sort().values)
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 2.2 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 16, 16)], ids=str)
def test_gaussian_noise_fills_any_shape(shape: tuple[int, int, int]) -> None:
    noise = gaussian_noise(SEEDS, INDICES, DRAWS, shape)
    assert noise.shape == (4, *shape)
    assert noise.isfinite().all()


def test_gaussian_noise_of_no_image_is_empty() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert gaussian_noise(none, none, none, SHAPE).shape == (0, *SHAPE)


def test_philox_uniform_is_uniform_and_extends() -> None:
    u = philox_uniform(SEEDS, INDICES, DRAWS, 20001)
    assert u.shape == (4, 20001)
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    n = u.numel()
    assert abs(u.mean().item() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs((u**2).mean().item() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert torch.equal(philox_uniform(SEEDS, INDICES, DRAWS, 3), u[:, :3])
    fine_bits = (u * 2**53).long() & 0xFF
    assert fine_bits.unique().numel() == 256


@pytest.mark.parametrize("draw", [gaussian_noise, philox_uniform], ids=lambda function: function.__name__)
def test_noise_compiles_without_graph_breaks(draw: Callable[..., Tensor]) -> None:
    size = SHAPE if draw is gaussian_noise else 17
    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    assert torch.equal(compiled(SEEDS, INDICES, DRAWS, size), draw(SEEDS, INDICES, DRAWS, size))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_gaussian_noise_compiled_is_the_same_noise() -> None:
    compiled = torch.compile(gaussian_noise, fullgraph=True)
    assert torch.equal(compiled(SEEDS, INDICES, DRAWS, SHAPE), gaussian_noise(SEEDS, INDICES, DRAWS, SHAPE))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 16, 16)], ids=str)
def test_gaussian_noise_by_the_kernel_is_the_same_noise(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    interpret_kernels(noise_kernels, monkeypatch)
    seeds, draws = torch.tensor([2**63 - 1, 2**33 + 5]), torch.tensor([0, 2**32 - 1])
    indices = torch.tensor([2**40 + 3, 0])
    made = noise._noise_by_kernel(seeds, indices, draws, math.prod(shape)).reshape(-1, *shape)
    torch.testing.assert_close(made, gaussian_noise(seeds, indices, draws, shape), rtol=1.2e-7, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gaussian_noise_on_cuda_equals_cpu() -> None:
    cpu = gaussian_noise(SEEDS, INDICES, DRAWS, (4, 64, 64))
    cuda = gaussian_noise(SEEDS.cuda(), INDICES.cuda(), DRAWS.cuda(), (4, 64, 64)).cpu()
    # float64 log, sin and cos may differ in their last place; rounding to fp32 hides all but rare ties
    torch.testing.assert_close(cuda, cpu, rtol=1.2e-7, atol=0)
    assert (cuda != cpu).sum() <= 2
