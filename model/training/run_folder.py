"""The folder of a run, which one run at a time may have.

Two at once, as a job that is started again before its first process is gone, would take each other's
half-written states for what a crash left, and remove them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from model.lock_file import locked, taken
from model.messages import one_line
from model.training.world import World

__all__ = ["claimed_folder"]

_LOCK_FILE = ".lock"
_FOLDERS = ("latents", "states", "snapshots", "samples", "model")
"""What a run makes in it, some of it after hours of work."""


@contextmanager
def claimed_folder(folder: Path, world: World) -> Iterator[None]:
    """Make the folder, and keep other runs out of it while the block runs; all ranks call it together.

    Raises ValueError where it cannot be made or written, or where another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir: {folder} is no folder and cannot be made ({one_line(error)})"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: {folder} given; a folder that this user may write to is accepted")
    for path in (folder / name for name in _FOLDERS):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir: {path} is a file; a run makes a folder of that name")
    with ExitStack() as stack:
        if not world.shared(not world.is_main or stack.enter_context(locked(folder / _LOCK_FILE))):
            raise taken(folder)
        yield
