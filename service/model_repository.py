"""The model repository: a folder whose sub-folders in diffusers' layout are models, named as they are.

Names of models are looked up among those that a listing gives: no text of a request becomes part of a path.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ModelRepository"]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HIDDEN: Final = "."

_logger = logging.getLogger(__name__)


class ModelRepository:
    """Reads the folder anew at each call: models come and go while a server runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._skipped: dict[Path, str] = {}

    def models(self) -> dict[str, Path]:
        """The models' folders by name, ascending; raises OSError for a repository that cannot be read.

        Sub-folders whose names begin with a dot do not count; other ones that are no model are logged, once.
        """
        found: dict[str, Path] = {}
        skipped: dict[Path, str] = {}
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(_HIDDEN) or not path.is_dir():
                continue
            if not _NAME.fullmatch(path.name):
                skipped[path] = "a model's name is 1 to 64 of A-Z a-z 0-9 . _ -"
            elif not (path / "model_index.json").is_file():
                skipped[path] = "it has no model_index.json"
            else:
                found[path.name] = path
        for path, reason in skipped.items():
            if self._skipped.get(path) != reason:
                _logger.warning("%s is skipped: %s", path, reason)
        self._skipped = skipped
        return found
