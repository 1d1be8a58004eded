"""The latents cache on disk: the posterior's moments of both flips of each image, read a batch at a time.

A folder, as `model.data.prepare_latents` writes it, holds
    latents-00000.safetensors ...  `moments` (n, 2, 2C, h, w) fp16 and `labels` (n,) int64: n images, each as
                                   it is and then mirrored; mean, then log-variance, unscaled
    latents-00000.json ...         the shard's record: its checksum, its counts, what its numbers depend on
    index.json                     written last: the names of the classes, and all shards
An image at 256 px under an f8 autoencoder takes 16 KiB a flip: 42 GB for ImageNet.

A batch is read sample by sample, where its order puts it, straight from the files: nothing is held but the
system's page cache. Not by a memory map, where a file that breaks away under it kills the process (SIGBUS),
and where a sample that is not yet in memory costs a page fault for each 4 KiB, one after the other: here the
system is told of the whole batch first, and a sample is one read.

Legend: n images, C latent channels, h, w latent positions.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.messages import one_line

__all__ = ["FORMAT", "INDEX_FILE", "VERSION", "LatentShards", "read_index"]

FORMAT = "lamamba-latents"
VERSION = 1
INDEX_FILE = "index.json"

_MOMENTS_BYTES = np.dtype(np.float16).itemsize
_MAX_HEADER_BYTES = 2**20  # safetensors allows 100 MB; that of two tensors has some 300 bytes


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """An open shard, and where its tensors begin."""

    path: Path
    file: int
    num_images: int
    moments_offset: int
    labels_offset: int


class LatentShards:
    """A whole latents cache, open for reading from any thread.

    Attributes:
        folder: where it lies.
        labels: the names of the classes.
        class_ids: (n,) int64, the class of each image.
        moments_shape: (2C, h, w), of one flip of an image.
        resolution: side of the encoded images in pixels.
        digest: 64 hex digits of all that the latents are; another digest is another training set.
        autoencoder_hash: `Autoencoder.weights_hash`, in fp32, of the autoencoder that made them.
        index: all that index.json says.
    """

    def __init__(self, folder: Path, index: dict[str, Any], shards: Sequence[_Shard]) -> None:
        """Take open shards, which are closed with this; `open` finds them."""
        self._close = weakref.finalize(self, _close_files, [shard.file for shard in shards])
        self.folder, self.index = folder, index
        self.labels: tuple[str, ...] = tuple(index["labels"])
        self.resolution = int(index["made_from"]["resolution"])
        self.autoencoder_hash = str(index["made_from"]["autoencoder"])
        self.digest = str(index["digest"])
        self.moments_shape: tuple[int, int, int] = tuple(index["moments_shape"])
        self._shards = shards
        self._files = np.array([shard.file for shard in shards])
        self._offsets = np.array([shard.moments_offset for shard in shards])
        self._ends = np.cumsum([shard.num_images for shard in shards])
        self._starts = self._ends - [shard.num_images for shard in shards]
        self.class_ids = np.empty(int(self._ends[-1]), np.int64)
        for shard, start, end in zip(shards, self._starts, self._ends, strict=True):
            _read_into(self.class_ids[start:end], shard.file, shard.labels_offset, shard.path)
        wrong = self.class_ids[(self.class_ids < 0) | (self.class_ids >= len(self.labels))]
        if wrong.size:
            raise ValueError(f"{folder}: an image of class {wrong[0]}; it names {len(self.labels)} classes")

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a cache and check that its files are those of its index, in name, size and layout.

        Contents are compared with their checksums by `lamamba prepare-latents --verify` alone. Raises
        ValueError, one line, for a folder that is not a whole cache.
        """
        folder = Path(folder)
        index = read_index(folder)
        return cls(folder, index, _open_shards(folder, index))

    def __len__(self) -> int:
        """Images, each of which has two flips."""
        return len(self.class_ids)

    def moments(
        self, positions: NDArray[np.int64], flips: NDArray[np.bool_], out: Tensor | None = None
    ) -> Tensor:
        """Moments (n, 2C, h, w) fp16 on the CPU of images (n,), mirrored where `flips` (n,) says so.

        `out` is a contiguous tensor of that shape to read into, e.g. in pinned memory.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise ValueError(
                f"positions: {positions.min()} to {positions.max()} given; 0 to {len(self) - 1} is accepted"
            )
        if out is None:
            out = torch.empty(len(positions), *self.moments_shape, dtype=torch.float16)
        which = np.searchsorted(self._ends, positions, side="right")
        rows = 2 * (positions - self._starts[which]) + np.asarray(flips, np.int64)
        num_bytes = math.prod(self.moments_shape) * _MOMENTS_BYTES
        offsets = (self._offsets[which] + rows * num_bytes).tolist()
        files = self._files[which].tolist()
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for file, offset in zip(files, offsets, strict=True):
                os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_WILLNEED)
        for row, file, offset, shard in zip(out.numpy(), files, offsets, which, strict=True):
            _read_into(row, file, offset, self._shards[shard].path)
        return out

    def close(self) -> None:
        """Close the files, after whatever reads them; without it they are closed when the object is gone."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a cache, of this version and with all that is read here; ValueError for another file."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"latents: {folder} has no {INDEX_FILE}; a folder that `lamamba prepare-latents` finished is "
            "accepted"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"latents: {path} cannot be read ({one_line(error)})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"latents: {path} is not the index of a latents cache")
    if index.get("version") != VERSION:
        raise ValueError(f"latents: {path} has version {index.get('version')}; {VERSION} is accepted")
    shape = index.get("moments_shape")
    is_whole = (
        isinstance(index.get("labels"), list)
        and isinstance(index.get("digest"), str)
        and isinstance(shape, list)
        and len(shape) == 3
        and all(isinstance(size, int) and size > 0 for size in shape)
        and isinstance(index.get("made_from"), dict)
        and _has(index["made_from"], resolution=int, autoencoder=str)
        and isinstance(index.get("shards"), list)
        and bool(index["shards"])
        and all(_has(shard, file=str, num_images=int, bytes=int) for shard in index["shards"])
    )
    if not is_whole:
        raise ValueError(f"latents: {path} is damaged, entries are missing or of another kind")
    return index


def _has(entry: object, **kinds: type) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())


def _open_shards(folder: Path, index: dict[str, Any]) -> list[_Shard]:
    shards: list[_Shard] = []
    try:
        for entry in index["shards"]:  # one by one: what is open is closed where the next is refused
            shards += [_open_shard(folder / entry["file"], entry, tuple(index["moments_shape"]))]
    except BaseException:
        _close_files([shard.file for shard in shards])
        raise
    return shards


def _open_shard(path: Path, entry: dict[str, Any], moments_shape: tuple[int, int, int]) -> _Shard:
    num_images, num_bytes = int(entry["num_images"]), int(entry["bytes"])
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"latents: {path} cannot be opened ({one_line(error)})") from error
    try:
        found = os.fstat(file).st_size
        if found != num_bytes:
            raise ValueError(f"latents: {path} has {found:,} bytes; its index says {num_bytes:,}")
        header, data = _read_header(path, file)
        expected = {
            "moments": ("F16", [num_images, 2, *moments_shape]),
            "labels": ("I64", [num_images]),
        }
        offsets = {}
        for name, (dtype, shape) in expected.items():
            tensor = header.get(name)
            if not isinstance(tensor, dict) or [tensor.get("dtype"), tensor.get("shape")] != [dtype, shape]:
                raise ValueError(f"latents: {path} does not hold {name} {dtype} {shape}, as its index says")
            offsets[name] = data + int(tensor["data_offsets"][0])
        return _Shard(
            path=path,
            file=file,
            num_images=num_images,
            moments_offset=offsets["moments"],
            labels_offset=offsets["labels"],
        )
    except BaseException:
        os.close(file)
        raise


def _read_header(path: Path, file: int) -> tuple[dict[str, Any], int]:
    """The description of a safetensors file's tensors, and where their data begins."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    try:
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(os.pread(file, length, 8))
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
    except ValueError as error:
        raise ValueError(f"latents: {path} is not a safetensors file ({one_line(error)})") from error
    return header, 8 + length


def _read_into(row: NDArray[Any], file: int, offset: int, path: Path) -> None:
    """Fill a contiguous array from a file."""
    try:
        count = os.preadv(file, [row.data], offset)
    except OSError as error:
        raise ValueError(f"latents: {path} cannot be read ({one_line(error)})") from error
    if count != row.nbytes:
        raise ValueError(f"latents: {path} ends within an image; it was whole when it was opened")


def _close_files(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)
