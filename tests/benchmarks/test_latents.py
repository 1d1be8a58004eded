"""benchmarks/latents.py: if this fails, the data path's figures are of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import latents


def test_reading_reads_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD_IMAGES", 300)
    figures = latents.reading(tmp_path, cache_gb=0.02, num_batches=2)
    assert figures["cache_images"] == 600
    assert figures["from_page_cache"]["images_per_second"] > 0


def test_rounding_orders_the_errors() -> None:
    """Why float32 is the default, and why fp16 is enough for what it makes."""
    rms = latents.rounding(1)
    assert rms["keeping_fp16"] < 0.2 * rms["posterior"]
    assert rms["posterior"] < rms["encoding_in_bfloat16"] < 0.1 * rms["latents"]
