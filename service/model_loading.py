"""From the settings to loaded models: where models come from, and their copies, one a device.

models            folders and hub ids, each under the name that its index says
model_repository  sub-folders, each under its own name
neither           the shipped models
"""

from __future__ import annotations

import gc
import importlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from model.cpu_threads import available_cpu_threads
from model.messages import one_line
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir
from service.errors import StartupError
from service.logs import adopt_library_logs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.engine.pipeline import ServedPipeline
    from service.model_repository import ModelRepository
    from service.settings import Settings

__all__ = [
    "DETERMINISTIC_ROWS",
    "ModelCopies",
    "ModelSource",
    "first_sources",
    "import_libraries",
    "load_pipeline",
    "rows_of_calls",
]

DETERMINISTIC_ROWS: Final = 16
"""max_rows of a deterministic GPU by default: each step computes all of them, and one image alone waits for
as many.
"""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from."""

    folder: Path | str
    """A folder, or a hub id."""
    name: str | None
    """What it is served as; None: what its index says."""


def first_sources(settings: Settings, repository: ModelRepository | None) -> list[ModelSource]:
    """What is loaded at the start. Raises StartupError with one line if that is nothing."""
    sources = [ModelSource(folder=folder, name=None) for folder in settings.models]
    if repository is not None:
        sources += _repository_sources(repository, beside=bool(sources))
    return sources or [ModelSource(folder=folder, name=None) for folder in _shipped_folders()]


def _repository_sources(repository: ModelRepository, *, beside: bool) -> list[ModelSource]:
    folder = repository.folder
    try:
        models = repository.models()
    except OSError as error:
        reason = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise StartupError(f"model_repository: {folder} given; {reason}") from error
    if not models and not beside:
        raise StartupError(
            f"model_repository: {folder} given; none of its sub-folders is a model, with model_index.json"
        )
    return [ModelSource(folder=path, name=name) for name, path in models.items()]


def _shipped_folders() -> list[Path]:
    folders = [default_model_dir(resolution) for resolution in PRETRAINED_RESOLUTIONS]
    shipped = [folder for folder in folders if (folder / "model_index.json").is_file()]
    if not shipped:
        raise StartupError("models: none given and none shipped; name one by --models or LAMAMBA_MODELS")
    return shipped


def import_libraries() -> None:
    """Import what models are loaded by, which takes seconds, before the first of them is.

    It stays as long as the process, so the garbage collector need not look at it again: it is half a million
    objects, which hold up all threads for a quarter of a second. Models come later and are collected.
    """
    gc.disable()  # once, at the end, is enough: it would go through them time and again while they come
    try:
        importlib.import_module("model.pipeline")
        gc.collect()
        gc.freeze()
    finally:
        gc.enable()


def load_pipeline(source: ModelSource, device: torch.device, settings: Settings) -> ServedPipeline:
    """Load a model for one device, as the settings say.

    Raises ValueError, one line that names the folder, or whatever else a broken folder or a full device makes
    libraries raise.
    """
    from model.pipeline import LaMambaPipeline

    adopt_library_logs()
    pipeline = LaMambaPipeline.load(
        source.folder,
        device=device,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        scan_backend=settings.scan_backend,
        num_row_threads=settings.num_threads or available_cpu_threads(),
        cuda_graphs=settings.cuda_graphs,
        compile=settings.compile,
        fixed_rows=rows_of_calls(settings, device),
    )
    if source.name is not None:
        pipeline = replace(pipeline, name=source.name)
    _logger.info(
        "loaded %s: %d px, %d classes, weights %s, on %s in %s, scan backend %s",
        *(pipeline.name, pipeline.resolution, pipeline.num_classes, pipeline.weights_hash),
        *(pipeline.device, str(pipeline.dtype).removeprefix("torch."), pipeline.scan_backend),
    )
    return pipeline


def rows_of_calls(settings: Settings, device: torch.device) -> int | None:
    """What all calls of the network are filled up to; None where they are as large as the steps."""
    if not settings.deterministic:
        return None
    return settings.max_rows or DETERMINISTIC_ROWS if device.type == "cuda" else 1


class ModelCopies:
    """Loads one version of a model for one engine after another, from the same weights each time."""

    def __init__(self, source: ModelSource, devices: Sequence[torch.device], settings: Settings) -> None:
        self.source = source
        self._devices = devices
        self._settings = settings
        self._weights_hash: str | None = None

    def __call__(self, index: int) -> ServedPipeline:
        """The copy of the engine of that index.

        Raises as `load_pipeline` does, and ValueError where the folder's weights are not those of the first
        copy any longer.
        """
        pipeline = load_pipeline(self.source, self._devices[index], self._settings)
        first = self._weights_hash or pipeline.weights_hash
        if pipeline.weights_hash != first:
            raise ValueError(
                f"{self.source.folder}: its weights are {pipeline.weights_hash} by now, and {first} are "
                f"served as {pipeline.name}; the model has to be loaded anew"
            )
        self._weights_hash = first
        return pipeline

    def at_start(self, index: int) -> ServedPipeline:
        """As a call. Raises StartupError with one line instead."""
        try:
            return self(index)
        except ValueError as error:  # the pipeline's own words, which name the folder
            raise StartupError(one_line(error)) from error
        except Exception as error:  # whatever else a broken folder or a full device makes libraries raise
            _logger.debug("loading %s failed", self.source.folder, exc_info=True)
            raise StartupError(f"{self.source.folder}: {type(error).__name__}: {one_line(error)}") from error
