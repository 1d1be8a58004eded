"""Which models are served, and how that changes while requests come: loading, swapping, unloading.

    load     folder -> a copy for each engine, in a thread -> warmed beside the other models -> swap
    swap     the catalog is replaced on the event loop: requests before it are made by the old version, those
             after it by the new one; the old one goes with its last image
    unload   the catalog without the model; its accepted images are made

Requests are resolved and submitted in one go on the event loop (`api.answering.accept`), so none falls
between two catalogs. A load that fails changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.messages import one_line
from service.catalog import Catalog, ServedModel
from service.engine.request import LaneName
from service.errors import (
    InsufficientMemory,
    LastModel,
    LoadInProgress,
    ModelLoadFailed,
    NotFound,
    ServiceError,
    UnusableModel,
    shown,
)
from service.futures import mark_seen
from service.model_loading import ModelCopies, ModelSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.api.schemas import ModelState
    from service.engine.group import EngineGroup
    from service.engine.pipeline import ServedPipeline
    from service.metrics import Metrics
    from service.model_repository import ModelRepository
    from service.settings import Settings

__all__ = ["ModelControl", "ModelStatus"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """One model, loaded or not."""

    name: str
    state: ModelState
    """loading: also while another version is served; unloading: images of it are still made."""
    served: ServedModel | None
    """The version that new requests get."""
    retiring_images: Mapping[int, int]
    """Images in the making of versions that new requests do not get, by version."""
    last_error: str | None
    """Why its last load failed, if it did."""


class ModelControl:
    """The catalog, and the only way to another one. Used on the event loop; what blocks runs in threads."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        engines: EngineGroup,
        *,
        devices: Sequence[torch.device],
        sources: Mapping[str, ModelSource],
        repository: ModelRepository | None,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            catalog: what `engines` serve.
            devices: of the engines, by index.
            sources: where models come from that are not in the repository, by name.
        """
        self.catalog = catalog
        self._settings = settings
        self._engines = engines
        self._devices = devices
        self._sources = sources
        self._repository = repository
        self._metrics = metrics
        self._versions = {model.name: model.version for model in catalog.models}
        """The last one of each name that was given to a load."""
        self._loading: str | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._errors: dict[str, str] = {}
        for model in catalog.models:
            metrics.show_model(model.name, version=model.version)

    async def load(self, name: str) -> ModelStatus:
        """Load a model, or a new version of a loaded one; it goes on when whoever waits for it leaves.

        Raises LoadInProgress, NotFound, or what says why the model cannot be served; then nothing changes.
        """
        if self._loading is not None:
            raise LoadInProgress(
                f"model: {shown(name)} given; {self._loading} is being loaded, and one is at a time"
            )
        self._loading = name
        self._load_task = asyncio.create_task(self._load(name))
        self._load_task.add_done_callback(self._end_load)
        self._load_task.add_done_callback(mark_seen)  # whoever waited for it may have left
        await asyncio.shield(self._load_task)
        return self._status(name)

    def unload(self, name: str) -> ModelStatus:
        """Serve a model no longer; accepted requests are finished.

        Raises NotFound, LoadInProgress for one that is being loaded, LastModel for the only one.
        """
        model = self.catalog.find(name)
        if self._loading == name:
            raise LoadInProgress(f"model: {name} given; it is being loaded, and can be unloaded after that")
        if len(self.catalog.models) == 1:
            raise LastModel(f"model: {name} given; it is the only one, and a server has one or more")
        self.catalog = self.catalog.without(name)
        self._engines.retire_lane(model.lane)
        self._metrics.hide_model(name)
        _logger.info("unloaded %s, version %d", name, model.version)
        return self._status(name)

    async def statuses(self) -> list[ModelStatus]:
        """All models that are loaded or could be, ascending by name. Raises ModelLoadFailed for a repository
        that cannot be read.
        """
        found = await asyncio.to_thread(self._found)
        names = found.keys() | self._versions.keys()
        statuses = [self._status(name) for name in sorted(names)]
        return [status for status in statuses if status.name in found or status.state != "available"]

    async def stop(self) -> None:
        """Wait for the end of a load, after the engines'."""
        if self._load_task is not None:
            await asyncio.wait([self._load_task])

    def _status(self, name: str) -> ModelStatus:
        served = next((model for model in self.catalog.models if model.name == name), None)
        retiring = self._engines.retiring_images(name)
        state: ModelState = "loaded" if served is not None else "unloading" if retiring else "available"
        return ModelStatus(
            name=name,
            state="loading" if self._loading == name else state,
            served=served,
            retiring_images=retiring,
            last_error=self._errors.get(name),
        )

    async def _load(self, name: str) -> None:
        started = time.monotonic()
        try:
            source = await asyncio.to_thread(self._source, name)
            if retiring := self._engines.retiring_images(name):
                version, images = next(iter(retiring.items()))
                raise LoadInProgress(
                    f"model: {name} given; {images} images of its version {version} are still being made, "
                    "and two versions are kept at a time"
                )
            lane = LaneName(name, self._versions.get(name, 0) + 1)
            self._versions[name] = lane.version
            pipeline = await asyncio.to_thread(self._add_lane, lane, source)
            self._swap(lane, pipeline)
        except (NotFound, LoadInProgress):
            raise
        except ServiceError as error:
            self._errors[name] = str(error)
            self._metrics.model_loads.labels("failed").inc()
            _logger.error("cannot load %s: %s", name, error)
            raise
        self._errors.pop(name, None)
        self._metrics.model_loads.labels("loaded").inc()
        seconds = time.monotonic() - started
        _logger.info(
            "%s, version %d, weights %s, is served after %.1f s", *lane, pipeline.weights_hash, seconds
        )

    def _end_load(self, task: asyncio.Task[None]) -> None:
        self._loading = self._load_task = None

    def _swap(self, lane: LaneName, pipeline: ServedPipeline) -> None:
        old = next((model for model in self.catalog.models if model.name == lane.model), None)
        new = ServedModel.of(pipeline, self._settings, version=lane.version)
        self.catalog = self.catalog.with_model(new)
        self._metrics.show_model(lane.model, version=lane.version)
        if old is not None:
            self._engines.retire_lane(old.lane)

    # --- a thread ---

    def _found(self) -> dict[str, ModelSource]:
        """Where each model that could be loaded comes from, by name."""
        if self._repository is None:
            return dict(self._sources)
        try:
            models = self._repository.models()
        except OSError as error:
            raise ModelLoadFailed(
                f"model_repository: {self._repository.folder} cannot be read ({error.strerror})"
            ) from error
        return {name: ModelSource(folder=path, name=name) for name, path in models.items()} | dict(
            self._sources
        )

    def _source(self, name: str) -> ModelSource:
        found = self._found()
        if name not in found:
            raise NotFound(
                f"model: {shown(name)} given; there is {', '.join(sorted(found)) or 'none'} to load"
            )
        return found[name]

    def _add_lane(self, lane: LaneName, source: ModelSource) -> ServedPipeline:
        """Have the engines serve the model; the copy of the first of them. Raises ServiceError."""
        try:
            return self._engines.add_lane(lane, ModelCopies(source, self._devices, self._settings))
        except ServiceError:  # the engine has died, or the server ends
            raise
        except Exception as error:  # whatever a broken folder or a full device makes libraries raise
            answer = _translated(error, source)
            level = logging.ERROR if isinstance(answer, ModelLoadFailed) else logging.DEBUG
            _logger.log(level, "loading %s failed", source.folder, exc_info=True)
            traceback.clear_frames(error.__traceback__)  # which hold what was loaded: gigabytes, maybe
            raise answer from error


def _translated(error: Exception, source: ModelSource) -> ServiceError:
    reason = one_line(error)
    if isinstance(error, ValueError):  # the pipeline's own words, which name the folder
        return UnusableModel(reason)
    if isinstance(error, ArithmeticError):
        return UnusableModel(f"{source.folder}: the first image failed: {reason}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return InsufficientMemory(f"{source.folder}: no memory beside what is loaded: {reason}")
    return ModelLoadFailed(f"{source.folder}: {type(error).__name__}: {reason}")
