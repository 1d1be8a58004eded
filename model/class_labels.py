"""Names of classes from a file: JSON or lines of text. Nothing here imports more than Python."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["LABELS_ACCEPTED", "read_labels"]

LABELS_ACCEPTED = "a JSON list, a JSON object to names, or lines of text are accepted"


def read_labels(path: Path) -> list[str] | dict[str, str]:
    """The names in `path`: a list (one a line, or a JSON list), or a JSON object from keys to names.

    Raises ValueError for a file that cannot be read, or that holds anything but names.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"labels: {path} cannot be read ({type(error).__name__}); {LABELS_ACCEPTED}"
        ) from error
    if isinstance(value, list) and value and value[-1] == "":
        value = value[:-1]
    names = list(value.values()) if isinstance(value, dict) else value
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"labels: {path} has entries that are not names; {LABELS_ACCEPTED}")
    if isinstance(value, dict):
        return {key: name.strip() for key, name in value.items()}
    return [name.strip() for name in names]
