"""What one process serves, from the first import to the last answer: models, engine, encoders, and their
states.

    loading -> ready -> draining -> stopped
       `-> failed (a model cannot be loaded, or the engine has died)
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import torch

from model import fixed_rows
from model.cpu_rows import prepare_process
from model.device import resolve_device
from model.messages import one_line
from service.catalog import Catalog, ServedModel
from service.engine.batching import CONTINUOUS, StaticBatching
from service.engine.decode import MAX_DECODE_BATCH
from service.engine.engine import Engine
from service.engine.group import EngineGroup
from service.engine.memory_probe import probe_max_rows
from service.errors import Draining, EngineFailure, EngineStopped, NotReady, StartupError
from service.idempotency import IdempotentAnswers
from service.metrics import Metrics
from service.model_control import ModelControl
from service.model_loading import DETERMINISTIC_ROWS, ModelCopies, first_sources, import_libraries
from service.model_repository import ModelRepository
from service.rate_limits import RateLimits
from service.tracing import tracing_of_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.engine.batching import Batching
    from service.engine.group import LoadCopy
    from service.engine.pipeline import ServedPipeline
    from service.engine.request import LaneName
    from service.settings import Settings

__all__ = ["MAX_ROWS_ON_CPU", "Runtime", "RuntimeState"]

MAX_ROWS_ON_CPU: Final = 8
"""Rows of a step by default. A row costs the same in a batch of 8 as in one of 32, which would only make
everybody wait longer."""

# After a step the engine's thread waits until the one that runs Python (requests, decoder, encoders) gives
# way, by Python's default for up to 5 ms: as long as a step of XL takes at few rows.
_SWITCH_INTERVAL_S = 0.0005

_logger = logging.getLogger(__name__)


class RuntimeState(StrEnum):
    """Where the process is between start and end."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Runtime:
    """The parts that the routes share. Used on the event loop; what blocks runs in threads."""

    def __init__(self, settings: Settings, pipelines: Sequence[ServedPipeline] | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.show_build(version=version("lamamba"), torch=torch.__version__)
        self.rate_limits = RateLimits(
            images_per_minute=settings.rate_limit_images_per_minute,
            images_per_day=settings.quota_images_per_day,
            max_images_per_request=settings.max_images_per_request,
        )
        self.idempotent_answers = IdempotentAnswers(
            max_entries=settings.idempotency_max_entries,
            max_bytes=settings.idempotency_max_bytes,
            ttl_s=settings.idempotency_ttl_s,
            metrics=self.metrics,
        )
        self.tracing = tracing_of_environment()
        self.encoders = ThreadPoolExecutor(settings.num_encoders, thread_name_prefix="lamamba-encoder")
        self.failure: StartupError | None = None
        self.supervised = False
        """Whether whoever runs the app reports a failed start, as `server.run_server` does: then it is not
        logged as well."""
        self._given = pipelines
        self._models: ModelControl | None = None
        self._engine: EngineGroup | None = None
        self._draining = False

    @property
    def state(self) -> RuntimeState:
        """Where the process is now."""
        if self.failure is not None or self.engine_failure is not None:
            return RuntimeState.FAILED
        if self._draining:
            return RuntimeState.DRAINING
        return RuntimeState.LOADING if self._engine is None else RuntimeState.READY

    @property
    def engine_failure(self) -> BaseException | None:
        """What the engine has died of."""
        return None if self._engine is None else self._engine.failure

    def check_alive(self) -> None:
        """Raises StartupError where the models cannot be loaded, EngineFailure where the engine has died."""
        if self.failure is not None:
            raise self.failure
        if self.engine_failure is not None:
            raise EngineFailure(
                f"the engine has died: {one_line(self.engine_failure)}; the log has its trace"
            ) from self.engine_failure

    @property
    def started(self) -> bool:
        """Whether the models have been loaded and warmed, whatever has happened since."""
        return self._engine is not None

    @property
    def ending(self) -> bool:
        """Whether the process draws to its end, so that a client should come back to another one."""
        return self.state in (RuntimeState.DRAINING, RuntimeState.FAILED)

    @property
    def idle(self) -> bool:
        """Whether every accepted request is answered."""
        return self._engine is None or self._engine.idle

    @property
    def models(self) -> ModelControl:
        """What changes which models are loaded. Raises NotReady while there are none."""
        if self._models is None:
            raise self._not_ready()
        return self._models

    @property
    def catalog(self) -> Catalog:
        """The loaded models. Raises NotReady while there are none."""
        return self.models.catalog

    @property
    def max_rows(self) -> int:
        """Network rows of a step. Raises NotReady while there are no models."""
        if self._engine is None:
            raise self._not_ready()
        return self._engine.max_rows

    @property
    def engine(self) -> EngineGroup:
        """The engines. Raises NotReady or Draining when it takes no requests."""
        if self._engine is None:
            raise self._not_ready()
        if self._draining:
            raise Draining("this server is shutting down and takes no further requests")
        return self._engine

    def _not_ready(self) -> NotReady | EngineStopped:
        if self.failure is not None:
            return EngineStopped(f"this server could not start: {self.failure}")
        return NotReady("the models are being loaded; ask again soon")

    async def start(self) -> None:
        """Load and warm the models; keeps a failure to be looked at, since the server answers meanwhile."""
        started = time.monotonic()
        try:
            await asyncio.to_thread(self._start)
        except StartupError as error:
            self.failure = error
            _logger.log(logging.DEBUG if self.supervised else logging.ERROR, "cannot start: %s", error)
        except (
            Exception
        ) as error:  # a defect of ours: better an end with a trace than a start that never ends
            self.failure = StartupError(f"internal error: {type(error).__name__}: {one_line(error)}")
            _logger.exception("cannot start")
        else:
            _logger.info("ready after %.1f s", time.monotonic() - started)

    async def stop(self) -> None:
        """End the threads; work that is not finished is answered with Draining."""
        await self.give_up()
        if self._models is not None:
            await self._models.stop()
        self.encoders.shutdown(wait=False)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    async def give_up(self) -> None:
        """Answer accepted work that is not finished with Draining; images that are made are still encoded."""
        self._draining = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    def drain(self) -> None:
        """Turn new requests away; what was accepted is finished."""
        self._draining = True
        if self._engine is not None:
            self._engine.drain()

    def _start(self) -> None:
        settings = self.settings
        prepare_process()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        try:
            devices = self._devices()
            if settings.deterministic and devices[0].type == "cuda":
                fixed_rows.prepare_process()
            num_engines = len(devices)
            folder = settings.model_repository
            repository = None if folder is None else ModelRepository(folder)
            sources = [] if self._given is not None else first_sources(settings, repository)
            if sources:
                import_libraries()
            copies = [ModelCopies(source, devices, settings) for source in sources]
            loaded = [
                self._given or [copy.at_start(index) for copy in copies] for index in range(num_engines)
            ]
            catalog = Catalog(tuple(ServedModel.of(pipeline, settings) for pipeline in loaded[0]))
            lanes = [model.lane for model in catalog.models]
            engine = EngineGroup(
                [
                    self._engine_of(dict(zip(lanes, pipelines, strict=True)), num_engines)
                    for pipelines in loaded
                ],
                lanes=dict(zip(lanes, copies or map(_given, loaded[0]), strict=True)),
                rebuild=lambda index, lanes: self._engine_of(
                    {lane: load(index) for lane, load in lanes.items()}, num_engines
                ),
                metrics=self.metrics,
            )
        except ValueError as error:
            raise StartupError(str(error)) from error
        try:
            engine.start()
        except Exception as error:  # a model that loads and does not run is as bad as one that does not load
            engine.stop()
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise StartupError(f"the first image failed: {reason}") from error
        self._show_gpu_memory(devices)
        self._models = ModelControl(
            settings,
            catalog,
            engine,
            devices=devices,
            sources={
                model.name: replace(source, name=model.name)
                for model, source in zip(catalog.models, sources, strict=False)
                if source.name is None
            },
            repository=repository,
            metrics=self.metrics,
        )
        self._engine = engine

    def _show_gpu_memory(self, devices: Sequence[torch.device]) -> None:
        for device in devices:
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                self.metrics.read_gpu_memory(
                    device,
                    {
                        "allocated": partial(torch.cuda.memory_allocated, device),
                        "reserved": partial(torch.cuda.memory_reserved, device),
                        "total": partial(int, total),
                    },
                )

    def _engine_of(self, pipelines: Mapping[LaneName, ServedPipeline], num_engines: int) -> Engine:
        settings = self.settings
        max_rows = settings.max_rows or self._default_max_rows(list(pipelines.values()))
        return Engine(
            pipelines,
            max_rows=max_rows,
            max_queue_images=-(-settings.max_queue_images // num_engines),
            metrics=self.metrics,
            priority_aging_s=settings.priority_aging_s,
            batching=_batching(settings, max_rows),
        )

    def _default_max_rows(self, pipelines: Sequence[ServedPipeline]) -> int:
        """Raises ValueError where a GPU has no memory for any."""
        if pipelines[0].device.type != "cuda":
            return MAX_ROWS_ON_CPU
        if self.settings.deterministic:
            return DETERMINISTIC_ROWS
        return probe_max_rows(pipelines, decode_batch=MAX_DECODE_BATCH, captured=self.settings.cuda_graphs)

    def _devices(self) -> list[torch.device]:
        if self._given is not None:
            return [self._given[0].device]
        return serving_devices(self.settings.device, self.settings.gpus)


def _given(pipeline: ServedPipeline) -> LoadCopy:
    """What "loads" a model that the app was handed: its one engine is never made again."""
    return lambda index: pipeline


def serving_devices(device: str, gpus: str) -> list[torch.device]:
    """The devices of the settings of these names, one an engine.

    Raises ValueError for one that this machine does not have.
    """
    if not gpus:
        return [resolve_device(None if device == "auto" else device)]
    if device != "auto":
        raise ValueError(f"gpus: {gpus} given beside device {device}; one of the two is accepted")
    if gpus == "all":
        resolve_device("cuda")
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [resolve_device(f"cuda:{index}") for index in gpus.split(",")]


def _batching(settings: Settings, max_rows: int) -> Batching:
    if settings.batching == "continuous":
        return CONTINUOUS
    batch_size = settings.batch_size or max_rows // 2
    if batch_size > max_rows:
        raise ValueError(f"batch_size: {batch_size} given; with max_rows {max_rows}, 1 to {max_rows}")
    return StaticBatching(max_images=batch_size, wait_s=settings.batch_wait_ms / 1000)
