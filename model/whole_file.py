"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model.messages import one_line

__all__ = ["whole_file", "write_json"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to it once on the disk, removed if the block raises.

    What safetensors raises of a full disk becomes an OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            yield temporary
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({one_line(error)})") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> Path:
    """Write a value as JSON for people, indented and with a newline at the end; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return path
