"""Training states on disk: written whole or not at all, and the newest whole one found again.

A state is one file `state-<images>.pt`, written beside its final name, flushed to the disk and renamed. Older
ones are removed only once the new one is durable.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_STATE_NAME = re.compile(r"state-(\d+)\.pt")


def save_state(folder: Path, images_seen: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (tensors and plain values) for `images_seen`; keep the newest `keep` states."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{images_seen:012d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in _state_files(folder)[keep:]:
        old.unlink()
    return path


def load_newest_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest readable state of `folder`, or None. After a damaged one comes the one before it."""
    for path in _state_files(folder):
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            logger.warning("%s is damaged (%s); falling back to the state before it", path, error)
            continue
        logger.info("resuming from %s", path)
        return state
    return None


def _state_files(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STATE_NAME.fullmatch(path.name)), reverse=True)
