"""If these fail, training sees other samples than those of its count, or waits for ever for a dead reader."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data.latent_shards import LatentShards
from model.data.prefetch import Prefetcher
from model.data.sample_order import shuffled
from tests.latents_cache import save_latents

Batch = tuple[torch.Tensor, torch.Tensor]
"""Moments and labels."""
CPU = torch.device("cpu")
SEED = 4


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[LatentShards]:
    save_latents(tmp_path)
    with LatentShards.open(tmp_path) as opened:
        yield opened


def taken(prefetcher: Prefetcher, shards: LatentShards, rows: int, count: int) -> list[Batch]:
    """So many batches of this many rows, all of them through the same two tensors."""
    moments, labels = new_tensors(shards, rows)
    batches = []
    with prefetcher:
        for _ in range(count):
            prefetcher.next_into(moments, labels)
            batches.append((moments.clone(), labels.clone()))
    return batches


def new_tensors(shards: LatentShards, rows: int, device: torch.device = CPU) -> Batch:
    moments = torch.empty(rows, *shards.moments_shape, dtype=torch.float16, device=device)
    return moments, torch.empty(rows, dtype=torch.int64, device=device)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("first_sample", [0, 13])
def test_prefetcher_hands_over_exactly_the_samples_of_the_run(
    shards: LatentShards, world_size: int, first_sample: int
) -> None:
    """Over several epochs, and wherever a run resumes."""
    parts = [
        taken(
            Prefetcher(
                shards,
                first_sample=first_sample,
                batch_size=8,
                seed=SEED,
                device=CPU,
                rank=rank,
                world_size=world_size,
                depth=2,
            ),
            shards,
            8 // world_size,
            9,
        )
        for rank in range(world_size)
    ]
    for step in range(9):
        moments, labels = zip(*(part[step] for part in parts), strict=True)
        first = first_sample + 8 * step
        positions, flips = shuffled(np.arange(first, first + 8), len(shards), SEED)
        assert torch.equal(torch.cat(moments), shards.moments(positions, flips))
        assert np.array_equal(torch.cat(labels), shards.class_ids[positions])


def test_prefetcher_raises_what_the_reader_raised(
    shards: LatentShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = iter([None, None])
    original = shards.moments

    def failing(*args: object, **kwargs: object) -> torch.Tensor:
        if next(reads, "spent") == "spent":
            raise OSError("the disk is gone")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "moments", failing)
    batch = new_tensors(shards, 2)
    with Prefetcher(shards, first_sample=0, batch_size=2, seed=0, device=CPU) as prefetcher:
        prefetcher.next_into(*batch)
        prefetcher.next_into(*batch)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                prefetcher.next_into(*batch)


def test_close_ends_the_thread(shards: LatentShards) -> None:
    before = set(threading.enumerate())
    prefetcher = Prefetcher(shards, first_sample=0, batch_size=2, seed=0, device=CPU)
    (thread,) = set(threading.enumerate()) - before
    prefetcher.next_into(*new_tensors(shards, 2))
    prefetcher.close()
    assert not thread.is_alive()
    prefetcher.close()
    with pytest.raises(ValueError, match="a closed prefetcher has no batches"):
        prefetcher.next_into(*new_tensors(shards, 2))


def test_prefetcher_reads_no_further_ahead_than_its_depth(
    shards: LatentShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = threading.Semaphore(0)
    original = shards.moments

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        read.release()
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "moments", counted)
    with Prefetcher(shards, first_sample=0, batch_size=2, seed=0, device=CPU, depth=3) as prefetcher:
        assert all(read.acquire(timeout=10) for _ in range(3))
        assert not read.acquire(timeout=0.1)
        prefetcher.next_into(*new_tensors(shards, 2))
        assert read.acquire(timeout=10)


def test_prefetcher_refuses_a_batch_that_does_not_split(shards: LatentShards) -> None:
    with pytest.raises(ValueError, match="batch_size: 9 given; a multiple of 2, the number of processes"):
        Prefetcher(shards, first_sample=0, batch_size=9, seed=0, device=CPU, world_size=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetcher_on_cuda_never_overwrites_a_copy_under_way(shards: LatentShards) -> None:
    device = torch.device("cuda")
    moments, labels = new_tensors(shards, 4, device)
    read = []
    with Prefetcher(shards, first_sample=0, batch_size=4, seed=SEED, device=device, depth=1) as prefetcher:
        torch.cuda._sleep(10**8)  # the host runs ahead of the device
        for _ in range(20):
            prefetcher.next_into(moments, labels)
            read.append(moments.clone())  # by the same stream, as a captured step reads them
    for step, seen in enumerate(read):
        positions, flips = shuffled(np.arange(4 * step, 4 * step + 4), len(shards), SEED)
        assert torch.equal(seen.cpu(), shards.moments(positions, flips))
