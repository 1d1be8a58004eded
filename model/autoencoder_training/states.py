"""Training states on disk: written whole or not at all, and the newest whole one found again.

A state is one file `state-<images>.pt`, written beside its final name, flushed to the disk and renamed. Older
ones are removed only once the new one is durable. One that the disk damaged is renamed to `*.damaged`, so
that it never counts as a state again.
"""

from __future__ import annotations

import errno
import logging
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from model.whole_file import whole_file

logger = logging.getLogger(__name__)

_STATE_NAME = re.compile(r"state-(\d+)\.pt")


def save_state(folder: Path, images_seen: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (tensors and plain values) for `images_seen`; keep `keep` files, this among them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{images_seen:012d}.pt"
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    others = [other for other in _state_files(folder) if other != path]
    for old in others[keep - 1 :]:
        old.unlink()
    return path


def load_newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest whole state of `folder`, its tensors on the CPU, or None; damaged ones are set aside.

    On the CPU, so that a full device is never taken for a damaged file, nor holds the state twice.
    """
    for path in _state_files(folder):
        state = _read(path)
        if state is not None:
            logger.info("resuming from %s", path)
            return state
        aside = path.replace(path.with_name(f"{path.name}.damaged"))
        logger.warning("%s: damaged, now %s; falling back to the state before it", path, aside.name)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """The state in `path`, or None if the file is damaged; raises what is not its fault, e.g. for memory."""
    if not _is_whole(path):
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "PytorchStreamReader" in str(error):  # torch's name for what reads the archive
            return None
        raise
    return state


def _is_whole(path: Path) -> bool:
    """Whether the archive that a state is agrees with its checksums, at which torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
        return False  # the last three: lengths, methods and flags that make no sense
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset before the file's beginning
            return False
        raise


def _state_files(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STATE_NAME.fullmatch(path.name)), reverse=True)
