"""Saved states of a run: written whole or not at all, and the newest whole one found again.

A state is a folder `state-<images>` of torch.distributed.checkpoint's files, of which each rank writes its
part, and of `run.json`, which says what they belong to. It is written under another name, flushed to the disk
and renamed, and only then are older ones removed. All ranks see one file system.

A state that the disk damaged is renamed to `*.damaged`, so that it never counts as one again. Each tensor's
record has a checksum, which is looked at before anything is loaded. What was saved by some ranks is loaded by
any other number of them, under ddp or fsdp.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from model.messages import one_line
from model.training.world import World
from model.whole_file import whole_file

__all__ = [
    "FACTS_FILE",
    "VERSION",
    "SavedState",
    "StateFolder",
    "load_tensors",
    "newest_state",
    "state_folders",
    "state_path",
]

logger = logging.getLogger(__name__)

VERSION = 2  # 1 were single files
FACTS_FILE = "run.json"
_METADATA_FILE = ".metadata"
_WRITING_THREADS = 4  # of a rank, each with a file: a single one is bound by a core, and XL's state has 10 GB
_NAME = re.compile(r"state-(\d+)")
_LEFT_OVER = ".state-*.tmp"  # of a save, or of a removal, that was broken off
_FACTS: dict[str, type] = {  # what run.json says of every state
    "version": int,
    "images_seen": int,
    "metadata_sha256": str,
    "files": dict,
}


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state that was found whole."""

    folder: Path
    images_seen: int
    facts: dict[str, Any]
    """What `StateFolder.save` was given."""


class StateFolder:
    """The states of a run; all ranks call its methods together."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: int = 2,
        keep_every: int = 0,
        asynchronous: bool = False,
    ) -> None:
        """`keep` newest states are kept, and for good the first of each `keep_every` images.

        `asynchronous`: `save` returns once the state is copied to the host's memory.
        """
        self.folder, self._world = folder, world
        self._keep, self._keep_every, self._asynchronous = keep, keep_every, asynchronous
        self._newest = -1
        self._pending: tuple[Future[Any], Path, Path, dict[str, Any]] | None = None

    def save(
        self, images_seen: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, healthy: bool = True
    ) -> None:
        """Write `tensors` and what they belong to, plain values; nothing where that was just done.

        Where not `healthy`, the last step had no finite gradients: the run may go on from there, but such a
        state never takes a healthy one's place.
        """
        if images_seen == self._newest:
            return
        self.finish()
        self._newest, started = images_seen, time.monotonic()
        path = state_path(self.folder, images_seen)
        temporary = self.folder / f".{path.name}.tmp"
        if self._world.is_main:
            for left in self.folder.glob(_LEFT_OVER):
                shutil.rmtree(left)
            temporary.mkdir(parents=True)
        self._world.barrier()
        content = {"version": VERSION, "images_seen": images_seen, "world_size": self._world.size}
        content |= {"healthy": healthy} | facts
        threads = _WRITING_THREADS if self._world.device.type == "cuda" else 1
        options: dict[str, Any] = {
            "storage_writer": FileSystemWriter(temporary, thread_count=threads),
            "process_group": self._world.saving,
            "no_dist": self._world.saving is None,
        }
        if self._asynchronous:
            future = async_save(dict(tensors), **options)
            assert isinstance(future, Future)
            self._pending = future, temporary, path, content
            return
        with _plain_errors(path):
            save(dict(tensors), **options)
        self._publish(temporary, path, content)
        logger.info("%s: saved in %.1f s", path, time.monotonic() - started)

    def bytes_to_save(self, state_bytes: int) -> int:
        """What has to be free for states of so many bytes: for all that are kept, without those kept for
        good, and for one more while it is written.
        """
        folders = state_folders(self.folder)
        for_good = self._kept_for_good([folder for folder in folders if _is_healthy(_facts(folder))])
        replaced = sum(_bytes(folder) for folder in folders if folder not in for_good)
        removed_first = sum(map(_bytes, self.folder.glob(_LEFT_OVER)))
        # However many states there are, the next is written before one of them goes.
        return max((self._keep + 1) * state_bytes - replaced, state_bytes) - removed_first

    def poll(self) -> None:
        """Publish a state whose writing has ended."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the state that is being written, if any; raises what writing it raised."""
        if self._pending is not None:
            future, temporary, path, content = self._pending
            self._pending = None
            with _plain_errors(path):
                future.result()
            self._publish(temporary, path, content)

    def _publish(self, temporary: Path, path: Path, content: dict[str, Any]) -> None:
        if not self._world.is_main:
            return
        metadata = (temporary / _METADATA_FILE).read_bytes()
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.glob("*.distcp"))}
        content |= {"metadata_sha256": hashlib.sha256(metadata).hexdigest(), "files": sizes}
        with whole_file(temporary / FACTS_FILE) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _flush_folder(temporary)
        if path.exists():
            _remove(path)
        temporary.replace(path)
        _flush_folder(self.folder)
        self._prune(path, healthy=content["healthy"])

    def _prune(self, newest: Path, *, healthy: bool) -> None:
        others = [folder for folder in state_folders(self.folder) if folder != newest]
        healthy_ones = [folder for folder in others if _is_healthy(_facts(folder))]
        # Beside an unhealthy one stays what a rollback can go back to.
        kept = {newest, *healthy_ones[: self._keep - 1 if healthy else max(self._keep - 1, 1)]}
        kept |= self._kept_for_good(healthy_ones)
        for folder in others:
            if folder not in kept:
                _remove(folder)

    def _kept_for_good(self, healthy_ones: list[Path]) -> set[Path]:
        """The first state of each part of the run, of these, newest first."""
        if not self._keep_every:
            return set()
        first: dict[int, Path] = {}
        for folder in reversed(healthy_ones):
            first.setdefault(_images(folder) // self._keep_every, folder)
        return {folder for part, folder in first.items() if part > 0}


def state_path(folder: Path, images_seen: int) -> Path:
    """Where the state after so many images lies, or would lie."""
    return folder / f"state-{images_seen:012d}"


def state_folders(folder: Path) -> list[Path]:
    """Newest first; none where `folder` does not exist."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def newest_state(folder: Path, world: World, *, healthy: bool = False) -> SavedState | None:
    """The newest whole state of `folder`, or None; damaged ones are set aside. All ranks call it together.

    `healthy`: one whose last step had finite gradients.

    Raises ValueError for states of another version of this format.
    """
    if any(folder.glob("state-*.pt")):
        raise ValueError(f"{folder}: states of version 1, single files; {VERSION} is accepted")
    for path in world.shared([str(path) for path in state_folders(folder)]):
        state = read_state(Path(path), part=world.rank, parts=world.size)
        if not world.largest(state is None):
            if healthy and state is not None and not _is_healthy(state.facts):
                continue
            return state
        if world.is_main:
            aside = Path(path).with_name(f"{Path(path).name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            Path(path).replace(aside)
            logger.warning("%s: damaged, now %s; falling back to the state before it", path, aside.name)
        world.barrier()
    return None


def read_state(folder: Path, *, part: int = 0, parts: int = 1) -> SavedState | None:
    """The state in `folder`, or None where it is damaged; of `parts` equal parts, `part` is looked at."""
    facts = _facts(folder)
    if "version" in facts and facts["version"] != VERSION:
        raise ValueError(f"{folder}: version {facts['version']} of a saved state; {VERSION} is accepted")
    if not all(isinstance(facts.get(name), kind) for name, kind in _FACTS.items()):
        return None
    try:
        metadata = (folder / _METADATA_FILE).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(metadata).hexdigest() != facts["metadata_sha256"]:
        return None
    for name, size in facts["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    records = sorted(_metadata(folder).storage_data.items(), key=lambda item: str(item[0]))
    for _, record in records[part::parts]:
        with (folder / record.relative_path).open("rb") as file:
            file.seek(record.offset)
            if not _is_whole(file.read(record.length)):
                return None
    return SavedState(folder=folder, images_seen=facts["images_seen"], facts=facts)


def load_tensors(state: SavedState, tensors: dict[str, Tensor], world: World | None = None) -> None:
    """Fill `tensors` in place with what the state has under their names; all ranks call it together.

    Raises ValueError for a tensor that the state does not have, or has in another shape.
    """
    saved = _metadata(state.folder).state_dict_metadata
    for name, tensor in tensors.items():
        entry = saved.get(name)
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            found = (
                f"has shape {tuple(entry.size)}" if isinstance(entry, TensorStorageMetadata) else "is missing"
            )
            raise ValueError(f"{state.folder}: {name} {found}; shape {tuple(tensor.shape)} is accepted")
    group = None if world is None else world.saving
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        load(
            dict(tensors),
            storage_reader=FileSystemReader(state.folder),
            process_group=group,
            no_dist=group is None,
        )


def _facts(folder: Path) -> dict[str, Any]:
    """What `run.json` says; nothing where it cannot be read."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_healthy(facts: dict[str, Any]) -> bool:
    return facts.get("healthy", True) is True  # states of earlier versions of this package do not say


def _metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def _is_whole(record: bytes) -> bool:
    """Whether the archive that a record is agrees with its checksums, at which torch does not look."""
    try:
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError):
        return False  # all but the first: lengths, methods and flags that make no sense


def _images(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.distcp"))


def _remove(folder: Path) -> None:
    """Under another name first: half a state must never look like one."""
    doomed = folder.with_name(f".{folder.name}.removed.tmp")
    folder.replace(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """torch's exception, which is none that `except Exception` knows, as an OSError of one line."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{path} could not be written (rank {rank}: {one_line(cause)})") from error


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
