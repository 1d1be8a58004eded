"""If this fails, a run encodes its views at each start, or ends without saying which file to remove."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from model.autoencoder import Autoencoder
from model.data.latents import LatentCache, places_latents
from model.data.places import Places


def _latents(folder: Path) -> LatentCache:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    panoramas = [np.full((8, 16, 3), level, np.uint8) for level in (50, 200)]
    places = Places(labels=("a", "b"), panoramas=panoramas, class_ids=(0, 1))
    return places_latents(places, autoencoder, size=16, num_views=5, folder=folder, batch_size=2)


def test_views_are_encoded_once_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    made = _latents(tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    read = _latents(tmp_path)
    assert torch.equal(made.moments, read.moments)
    assert torch.equal(made.labels, read.labels)
    assert (len(made), file.stat().st_mtime_ns) == (5, written)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"latents: .*{file.name} is damaged .*; without it the views are"):
        _latents(tmp_path)
