"""If this fails, ranks train on each other's images, or a resumed run on others than a straight one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from model.autoencoder import Autoencoder
from model.data.latent_shards import LatentShards
from model.data.latents import LatentCache
from model.data.sample_order import shuffled
from model.training.source import CachedSource, Source, StreamedSource
from tests.latents_cache import save_latents

SEED, BATCH, RANKS = 3, 6, 2
SAMPLES = [*range(0, 80 * BATCH, BATCH), 12, 18, 600, 0]  # a run, then jumps as resumptions make them


def _autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


def _seen(source: Source) -> list[torch.Tensor]:
    """The moments of every step, taken in two parts."""
    steps = []
    for first_sample in SAMPLES:
        source.prepare(first_sample)
        parts = [source.rows(part)[0].clone() for part in (slice(0, 2), slice(2, 3))]
        steps.append(torch.cat(parts))
    source.close()
    return steps


def test_cached_source_gives_each_rank_its_part_of_the_order() -> None:
    count = 10
    cache = LatentCache(torch.arange(count).half(), torch.arange(count), _autoencoder())
    for rank in range(RANKS):
        source = CachedSource(cache, rows=BATCH // RANKS, seed=SEED, rank=rank, world_size=RANKS)
        for first_sample, moments in zip(SAMPLES, _seen(source), strict=True):
            samples = first_sample + rank * BATCH // RANKS + np.arange(BATCH // RANKS)
            assert moments.tolist() == shuffled(samples, count, SEED)[0].tolist()


def test_streamed_source_gives_each_rank_its_part_of_the_order(tmp_path: Path) -> None:
    moments, _ = save_latents(tmp_path)
    with LatentShards.open(tmp_path) as shards:
        for rank in range(RANKS):
            source = StreamedSource(
                shards,
                _autoencoder(),
                batch_size=BATCH,
                seed=SEED,
                device=torch.device("cpu"),
                rank=rank,
                world_size=RANKS,
            )
            for first_sample, seen in zip(SAMPLES, _seen(source), strict=True):
                samples = first_sample + rank * BATCH // RANKS + np.arange(BATCH // RANKS)
                positions, flips = shuffled(samples, len(shards), SEED)
                assert np.array_equal(seen.numpy(), moments[positions, flips.astype(int)])
