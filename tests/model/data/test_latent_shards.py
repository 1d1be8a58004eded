"""If these fail, training reads other latents than were encoded, or dies of a damaged file without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.data.latent_shards import INDEX_FILE, LatentShards
from tests.latents_cache import LABELS, MADE_FROM, save_latents

SECOND = "latents-00001.safetensors"


def test_moments_are_those_of_the_images_and_flips(tmp_path: Path) -> None:
    moments, labels = save_latents(tmp_path)
    with LatentShards.open(tmp_path) as shards:
        assert len(shards) == 10
        assert shards.labels == LABELS
        assert shards.resolution == 16
        assert shards.autoencoder_hash == MADE_FROM["autoencoder"]
        assert shards.moments_shape == (8, 4, 4)
        assert np.array_equal(shards.class_ids, labels)
        positions = np.array([9, 0, 5, 4, 6, 5, 0])
        flips = np.array([True, False, True, False, False, False, True])
        read = shards.moments(positions, flips)
        assert read.dtype == torch.float16
        assert np.array_equal(read.numpy(), moments[positions, flips.astype(int)])
        out = torch.zeros_like(read)
        assert shards.moments(positions, flips, out=out) is out
        assert torch.equal(out, read)
        assert len(shards.moments(positions[:0], flips[:0])) == 0


def test_open_leaves_out_a_shard_without_images(tmp_path: Path) -> None:
    moments, _ = save_latents(tmp_path, (2, 0, 3))
    with LatentShards.open(tmp_path) as shards:
        assert len(shards) == 5
        assert np.array_equal(shards.moments(np.arange(5), np.zeros(5, bool)).numpy(), moments[:, 0])


def test_digest_tells_data_sets_apart(tmp_path: Path) -> None:
    digests = []
    for name, sizes in (("a", (5, 5)), ("same", (5, 5)), ("b", (5, 4))):
        save_latents(tmp_path / name, sizes)
        with LatentShards.open(tmp_path / name) as shards:
            digests.append(shards.digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("position", [-1, 10])
def test_moments_refuses_positions_outside(tmp_path: Path, position: int) -> None:
    save_latents(tmp_path)
    with (
        LatentShards.open(tmp_path) as shards,
        pytest.raises(ValueError, match=f"positions: {position} to {position} given; 0 to 9"),
    ):
        shards.moments(np.array([position]), np.array([False]))


def _truncate(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])


def _overwrite(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(b"\xff" * path.stat().st_size)


def _swap(folder: Path) -> None:
    """The same number of bytes in another layout."""
    path = folder / SECOND
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"I16"'))


def _mislabel(folder: Path) -> None:
    path = folder / SECOND
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    first, end = (start + offset for offset in header["labels"]["data_offsets"])
    path.write_bytes(content[:first] + np.array([3]).tobytes() + content[end:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ((lambda folder: (folder / SECOND).unlink()), rf"{SECOND} cannot be opened \(.*No such file"),
        (_truncate, rf"{SECOND} has 703 bytes; its index says 704"),
        (_overwrite, f"{SECOND} is not a safetensors file"),
        (_swap, f"{SECOND} does not hold moments F16"),
        (_mislabel, "an image of class 3; it names 3 classes"),
        ((lambda folder: (folder / INDEX_FILE).unlink()), "has no index.json; a folder that"),
        ((lambda folder: (folder / INDEX_FILE).write_text("{")), "index.json cannot be read"),
        ((lambda folder: (folder / INDEX_FILE).write_text("{}")), "is not the index of a latents cache"),
    ],
    ids=["missing", "truncated", "overwritten", "layout", "class", "no-index", "no-json", "other-json"],
)
def test_open_refuses_what_is_not_whole(tmp_path: Path, damage: Any, message: str) -> None:
    save_latents(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        LatentShards.open(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("version", 2, "has version 2; 1 is accepted"),
        ("shards", [], "index.json is damaged"),
        ("labels", None, "index.json is damaged"),
        ("moments_shape", [8, 4], "index.json is damaged"),
        ("made_from", {"resolution": "x", "autoencoder": "y"}, "index.json is damaged"),
        ("shards", [{"file": "a", "num_images": "x", "bytes": 1}], "index.json is damaged"),
    ],
)
def test_open_refuses_an_index(tmp_path: Path, entry: str, value: Any, message: str) -> None:
    save_latents(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    (tmp_path / INDEX_FILE).write_text(json.dumps(index | {entry: value}))
    with pytest.raises(ValueError, match=message):
        LatentShards.open(tmp_path)


def test_moments_of_a_file_that_shrinks_are_an_error(tmp_path: Path) -> None:
    save_latents(tmp_path)
    with LatentShards.open(tmp_path) as shards:
        _truncate(tmp_path)
        with pytest.raises(ValueError, match=f"{SECOND} ends within an image"):
            shards.moments(np.array([5]), np.array([True]))
