"""Writing a latents cache: shards and their records, each whole or not at all, and the index of them all.

A shard is finished when its record is there. The record is written after the shard and says what the shard's
numbers depend on (`made_from`), so that one folder never mixes two data sets, and what could not be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from model.data.latent_shards import FORMAT, INDEX_FILE, VERSION
from model.messages import one_line
from model.whole_file import whole_file, write_json

__all__ = ["ShardRecord", "shard_file", "write_index", "write_shard"]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is known of a finished shard."""

    file: str
    num_images: int
    bytes: int
    sha256: str
    images_of_class: list[int]
    bad_images: list[list[str]]
    """Name and reason of each image that could not be read."""
    made_from: dict[str, Any]
    """What the cache's numbers depend on, in plain values."""

    @classmethod
    def read(cls, folder: Path, number: int) -> Self | None:
        """The record of a shard, or None where it is not finished."""
        path = _record_path(folder, number)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"out: {path} cannot be read ({one_line(error)}); without that file its shard is made again"
            ) from error

    def is_present(self, folder: Path) -> bool:
        """Whether the shard's file is there, with all its bytes."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes

    def is_intact(self, folder: Path) -> bool:
        """Whether the shard's file has the checksum that it was written with."""
        return self.is_present(folder) and _sha256(folder / self.file) == self.sha256

    @staticmethod
    def remove(folder: Path, number: int) -> None:
        """Have a shard made again: forget its record, and with it the index."""
        (folder / INDEX_FILE).unlink(missing_ok=True)
        _record_path(folder, number).unlink(missing_ok=True)


def shard_file(number: int) -> str:
    """The name of a shard's file."""
    return f"latents-{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    *,
    moments: NDArray[np.float16],
    labels: NDArray[np.int64],
    num_classes: int,
    bad_images: Sequence[tuple[str, str]],
    made_from: dict[str, Any],
) -> ShardRecord:
    """Write moments (n, 2, 2C, h, w) and labels (n,) as a shard, then its record."""
    path = folder / shard_file(number)
    # Not save_file, whose files only their owner can read.
    content = save({"moments": moments, "labels": labels}, metadata={"format": FORMAT})
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    record = ShardRecord(
        file=path.name,
        num_images=len(labels),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        images_of_class=np.bincount(labels, minlength=num_classes).tolist(),
        bad_images=[[name, reason] for name, reason in bad_images],
        made_from=made_from,
    )
    write_json(_record_path(folder, number), asdict(record))
    return record


def write_index(
    folder: Path,
    records: Sequence[ShardRecord],
    *,
    labels: Sequence[str],
    moments_shape: tuple[int, int, int],
) -> None:
    """Write index.json over the records of all shards, in their order."""
    made_from = records[0].made_from
    shards = [
        {"file": r.file, "num_images": r.num_images, "bytes": r.bytes, "sha256": r.sha256}
        for r in records
        if r.num_images
    ]
    counts = np.sum([record.images_of_class for record in records], axis=0).tolist()
    identity = json.dumps([VERSION, made_from, list(labels), shards], sort_keys=True)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "made_from": made_from,
        "num_images": sum(counts),
        "num_bad_images": sum(len(record.bad_images) for record in records),
        "moments_shape": list(moments_shape),
        "labels": list(labels),
        "images_of_class": counts,
        "shards": shards,
    }
    write_json(folder / INDEX_FILE, index)


def _record_path(folder: Path, number: int) -> Path:
    return (folder / shard_file(number)).with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
