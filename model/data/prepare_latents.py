"""From images to a latents cache (`latent_shards.py`): encode both flips of each, shard by shard.

The images' numbers are cut into shards of equal length; shard k belongs to process k modulo their number. A
shard's content depends on its own images alone, in batches that begin with it: any number of processes writes
the same bytes, and a run that was killed goes on with the shards that have no record. Processes see one
another's work in the folder alone; the first writes the index when all records are there.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn

from model.autoencoder import Autoencoder
from model.data.image_batches import ImageBatch, ImageBatches
from model.data.latent_shards import INDEX_FILE
from model.data.shard_records import ShardRecord, write_index, write_shard
from model.lock_file import locked
from model.messages import one_line
from model.stop_request import StopRequest
from model.whole_file import whole_file

__all__ = ["BAD_IMAGES_FILE", "ENCODING_DTYPES", "PrepareConfig", "prepare_latents"]

logger = logging.getLogger(__name__)

BAD_IMAGES_FILE = "bad-images.txt"
ENCODING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Pixels encoded at a time: on a GPU 64 images of 256 px, each activation of SD's encoder 2 GB in fp32.
_ENCODING_PIXELS = {"cuda": 2**22, "cpu": 2**20}
_EXPLAINED = {
    "source_digest": "a list of images, sizes and labels with the digest",
    "autoencoder": "an autoencoder with the hash",
}
_FLIPS = 2
_POLL_S = 0.5
_REPORT_WAITING_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """How to write a cache. ValueError names a bad field, its value and what is accepted."""

    dtype: str = "float32"
    """What the encoder computes in (on GPUs float32 convolves in TF32, as torch does by default); moments are
    rounded to fp16 afterwards.
    """
    batch_size: int = 64
    """Images encoded at a time, each as two flips."""
    shard_images: int = 8192
    """Images of a shard, 268 MB at 256 px."""
    max_bad_share: float = 0.001
    """Of all images: that may be unreadable before the work stops."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ENCODING_DTYPES:
            raise ValueError(f"dtype: {self.dtype} given; one of {', '.join(ENCODING_DTYPES)} is accepted")
        for name in ("batch_size", "shard_images", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; 1 or more is accepted")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share: {self.max_bad_share} given; 0 to 1 is accepted")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: {self.rank} given; 0 to {self.world_size - 1} is accepted")


def prepare_latents(
    source: ImageBatches,
    folder: Path,
    *,
    autoencoder: str,
    device: torch.device,
    config: PrepareConfig | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the latents of `source` to `folder`, or go on with that; returns when the whole cache is there.

    Args:
        source: the images.
        folder: where the cache is, or is to be.
        autoencoder: the folder or hub id of the AutoencoderKL that encodes.
        device: what it runs on.
        config: how; by default as `PrepareConfig` says, in one process.
        verify: first compare the finished shards with their checksums, and make the damaged ones again.
        progress: shows how far this process is.

    Raises:
        ValueError: one line: what was asked for does not fit the folder's content, the autoencoder or the
            disk, another process of the same rank writes to it, or too many images are unreadable.
        SystemExit: after Ctrl-C or SIGTERM, with 130 or 143; finished shards stay.
    """
    config = config or PrepareConfig()
    if verify and config.world_size > 1:
        raise ValueError("verify: given to several processes; one process is accepted, without torchrun")
    encoder = Autoencoder.load(autoencoder)
    if source.resolution < 1 or source.resolution % encoder.downsampling:
        raise ValueError(
            f"resolution: {source.resolution} given; a multiple of {encoder.downsampling} is accepted"
        )
    made_from = {
        "source": source.kind,
        "source_digest": source.digest,
        "source_images": len(source),
        "resolution": source.resolution,
        "autoencoder": encoder.weights_hash,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "shard_images": config.shard_images,
    }
    nn.Module.to(encoder.module, device=device, dtype=ENCODING_DTYPES[config.dtype])  # torch's: no warnings
    encoder = Autoencoder(encoder.module, micro_batch_pixels=_ENCODING_PIXELS[device.type])
    run = _Run(source, folder, encoder, made_from, config)
    lock = folder / f".lock-{config.rank}"
    with locked(lock) as is_ours:
        if not is_ours:
            raise ValueError(
                f"out: {folder} is being written to by another process of rank {config.rank}; wait for its "
                "end, or choose another folder"
            )
        if verify:
            run.verify(progress)
        with StopRequest() as stop:
            run.encode(stop, progress)
            run.finish(stop)
        lock.unlink()  # a cache that is whole holds nothing else


class _Run:
    """One process's part of the work on a folder."""

    def __init__(
        self,
        source: ImageBatches,
        folder: Path,
        encoder: Autoencoder,
        made_from: dict[str, Any],
        config: PrepareConfig,
    ) -> None:
        self.source, self.folder, self.encoder = source, folder, encoder
        self.made_from, self.config = made_from, config
        self.side = source.resolution // encoder.downsampling
        self.moments_shape = (2 * encoder.latent_channels, self.side, self.side)
        self.num_shards = math.ceil(len(source) / config.shard_images)
        self.records: dict[int, ShardRecord] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: {folder} cannot be made ({one_line(error)})") from error
        self._read_records()
        self._check_disk()

    def verify(self, progress: Progress | None) -> None:
        """Forget the finished shards whose files are not what was written."""
        task = progress.add_task("verifying", total=len(self.records)) if progress else None
        for number, record in list(self.records.items()):
            if not record.is_intact(self.folder):
                logger.warning("%s: damaged, it is made again", self.folder / record.file)
                ShardRecord.remove(self.folder, number)
                del self.records[number]
            if progress and task is not None:
                progress.update(task, advance=1)

    def encode(self, stop: StopRequest, progress: Progress | None) -> None:
        """Write this process's shards that are not finished."""
        mine = range(self.config.rank, self.num_shards, self.config.world_size)
        missing = [number for number in mine if number not in self.records]
        total, left = (sum(len(self._shard(n)) for n in numbers) for numbers in (mine, missing))
        task = None
        if progress:
            task = progress.add_task(f"encoding at {self.source.resolution} px", total=total)
            progress.update(task, completed=total - left)
        spans = [(number, span) for number in missing for span in self._spans(self._shard(number))]
        batches = self.source.batches(span for _, span in spans)
        shard = self._new_shard()
        for (number, span), batch in zip(spans, batches, strict=True):
            if stop.received is not None:
                self._stop(stop)
            shard.add(self._encoded(batch, span), batch)
            self._check_bad_images(shard, batch)
            if progress and task is not None:
                progress.update(task, advance=len(span))
            if span.stop == self._shard(number).stop:
                self._write(number, shard)
                shard = self._new_shard()

    def finish(self, stop: StopRequest) -> None:
        """Wait for all shards; the first process then writes the index and the report.

        ValueError, on every process, where too many images are bad in all shards together.
        """
        reported = time.monotonic()
        while not self._is_complete():
            if stop.received is not None:
                self._stop(stop)
            if time.monotonic() - reported > _REPORT_WAITING_S:
                reported = time.monotonic()
                logger.info("waiting for %d shards of other processes", self.num_shards - len(self.records))
            time.sleep(_POLL_S)
        if self.config.rank:
            return
        records = [self.records[number] for number in range(self.num_shards)]
        bad = [(name, reason) for record in records for name, reason in record.bad_images]
        _write_report(self.folder, bad)
        num_images = sum(record.num_images for record in records)
        if not num_images:
            raise ValueError(f"source: none of its {len(self.source)} images can be read")
        write_index(self.folder, records, labels=self.source.labels, moments_shape=self.moments_shape)
        empty = [
            label
            for class_id, label in enumerate(self.source.labels)
            if not any(record.images_of_class[class_id] for record in records)
        ]
        if empty:
            logger.warning("%d classes have no images, %s among them", len(empty), ", ".join(empty[:3]))
        logger.info(
            "%s: %d images in %d shards, %d left out", self.folder, num_images, len(records), len(bad)
        )

    def _shard(self, number: int) -> range:
        """The numbers of a shard's images."""
        start = number * self.config.shard_images
        return range(start, min(start + self.config.shard_images, len(self.source)))

    def _spans(self, shard: range) -> Iterator[range]:
        for start in range(shard.start, shard.stop, self.config.batch_size):
            yield range(start, min(start + self.config.batch_size, shard.stop))

    def _new_shard(self) -> _OpenShard:
        return _OpenShard(min(self.config.shard_images, len(self.source)), self.moments_shape)

    def _encoded(self, batch: ImageBatch, span: range) -> Tensor:
        """Moments (n, 2, 2C, h, w) fp16 on the CPU."""
        images = torch.stack([batch.images, batch.images.flip(-1)], dim=1)  # (n, 2, 3, S, S)
        if not len(images):
            return torch.empty(0, _FLIPS, *self.moments_shape, dtype=torch.float16)
        moments = self.encoder.encode_moments(images.flatten(0, 1)).half()
        if not bool(moments.isfinite().all()):
            raise ValueError(
                f"autoencoder: its moments of images {span.start} to {span.stop - 1} of the source are not "
                f"finite in fp16, computed in {self.config.dtype}; another dtype may be"
            )
        return moments.unflatten(0, (-1, _FLIPS)).cpu()

    def _write(self, number: int, shard: _OpenShard) -> None:
        self.records[number] = write_shard(
            self.folder,
            number,
            moments=shard.moments[: shard.num_images],
            labels=shard.labels[: shard.num_images],
            num_classes=len(self.source.labels),
            bad_images=shard.bad_images,
            made_from=self.made_from,
        )
        self._read_records()
        logger.info("%s: %d images", self.records[number].file, shard.num_images)

    def _read_records(self) -> None:
        """Take in the shards that are finished, whoever made them; refuse those of other work."""
        for number in range(self.num_shards):
            if number in self.records:
                continue
            record = ShardRecord.read(self.folder, number)
            if record is None or not record.is_present(self.folder):
                continue
            for field, value in self.made_from.items():
                found = record.made_from.get(field)
                if found != value:
                    raise ValueError(
                        f"out: {self.folder} holds latents made with {_EXPLAINED.get(field, field)} {found}; "
                        f"{value} given, "
                        "continue with that or choose another folder"
                    )
            self.records[number] = record

    def _is_complete(self) -> bool:
        """Whether all shards are finished and, for all but the first process, whether the index is there."""
        self._read_records()
        self._check_bad_share()  # here, not in the first process alone: the others would wait for its index
        is_complete = len(self.records) == self.num_shards
        return is_complete and (self.config.rank == 0 or (self.folder / INDEX_FILE).is_file())

    def _check_disk(self) -> None:
        missing = [number for number in range(self.num_shards) if number not in self.records]
        images = sum(len(self._shard(number)) for number in missing)
        needed = images * _FLIPS * math.prod(self.moments_shape) * torch.float16.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"out: {self.folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed for "
                f"{images} images"
            )

    def _check_bad_images(self, shard: _OpenShard, batch: ImageBatch) -> None:
        """Report what could not be read; ValueError where it is too much so far."""
        if not batch.bad_images:
            return
        with (self.folder / BAD_IMAGES_FILE).open("ab") as file:
            file.write(_report(batch.bad_images))
        self._check_bad_share(shard.bad_images)

    def _check_bad_share(self, unfinished: Sequence[tuple[str, str]] = ()) -> None:
        """ValueError for too many bad images in all finished shards, whoever made them, and `unfinished`."""
        bad = [image for record in self.records.values() for image in record.bad_images] + list(unfinished)
        allowed = math.floor(self.config.max_bad_share * len(self.source))
        if len(bad) > allowed:
            name, reason = bad[-1]
            raise ValueError(
                f"max_bad_share: {self.config.max_bad_share:g} given, {allowed} of {len(self.source)} "
                f"images; {len(bad)} cannot be read so far, {name} the last ({reason}); all are in "
                f"{self.folder / BAD_IMAGES_FILE}"
            )

    def _stop(self, stop: StopRequest) -> None:
        assert stop.received is not None
        logger.info(
            "%s: stopped with %d of %d shards; the same command goes on",
            stop.received.name,
            len(self.records),
            self.num_shards,
        )
        raise SystemExit(stop.exit_code)


class _OpenShard:
    """A shard in memory, while it fills."""

    def __init__(self, capacity: int, moments_shape: tuple[int, int, int]) -> None:
        self.moments: NDArray[np.float16] = np.empty((capacity, _FLIPS, *moments_shape), np.float16)
        self.labels: NDArray[np.int64] = np.empty(capacity, np.int64)
        self.num_images = 0
        self.bad_images: list[tuple[str, str]] = []

    def add(self, moments: Tensor, batch: ImageBatch) -> None:
        end = self.num_images + len(batch.labels)
        self.moments[self.num_images : end] = moments.numpy()
        self.labels[self.num_images : end] = batch.labels
        self.num_images = end
        self.bad_images += batch.bad_images


def _write_report(folder: Path, bad_images: Sequence[tuple[str, str]]) -> None:
    path = folder / BAD_IMAGES_FILE
    if not bad_images:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as temporary:
        temporary.write_bytes(_report(bad_images))


def _report(bad_images: Sequence[tuple[str, str]]) -> bytes:
    """A line for each: its name, which need not be UTF-8, a tab, the reason."""
    return "".join(f"{name}\t{reason}\n" for name, reason in bad_images).encode(errors="surrogateescape")
