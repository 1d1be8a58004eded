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
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.device import resolve_device
from model.messages import one_line
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir
from service.catalog import Catalog, ServedModel
from service.engine.batching import CONTINUOUS, StaticBatching
from service.engine.engine import Engine
from service.engine.group import EngineGroup
from service.engine.request import LaneName
from service.errors import Draining, EngineStopped, NotReady, StartupError
from service.idempotency import IdempotentAnswers
from service.logs import adopt_library_logs
from service.metrics import Metrics
from service.rate_limits import RateLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.engine.batching import Batching
    from service.engine.pipeline import ServedPipeline
    from service.settings import Settings

__all__ = ["Runtime", "RuntimeState"]

# On a CPU a row costs the same in a batch of 8 as in one of 32, which would only make everybody wait longer.
_MAX_ROWS = {"cpu": 8, "cuda": 128}

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
        self.encoders = ThreadPoolExecutor(settings.num_encoders, thread_name_prefix="lamamba-encoder")
        self.failure: StartupError | None = None
        self.supervised = False
        """Whether whoever runs the app reports a failed start, as `server.run_server` does: then it is not
        logged as well."""
        self._given = pipelines
        self._catalog: Catalog | None = None
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

    @property
    def started(self) -> bool:
        """Whether the models have been loaded and warmed, whatever has happened since."""
        return self._engine is not None

    @property
    def idle(self) -> bool:
        """Whether every accepted request is answered."""
        return self._engine is None or self._engine.idle

    @property
    def catalog(self) -> Catalog:
        """The loaded models. Raises NotReady while there are none."""
        if self._catalog is None or self._engine is None:
            raise self._not_ready()
        return self._catalog

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
        self._draining = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        self.encoders.shutdown(wait=False)

    def drain(self) -> None:
        """Turn new requests away; what was accepted is finished."""
        self._draining = True
        if self._engine is not None:
            self._engine.drain()

    def _start(self) -> None:
        settings = self.settings
        prepare_process()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        devices = self._devices() if self._given is None else [self._given[0].device]
        loaded = [self._load(device) for device in devices] if self._given is None else [self._given]
        pipelines = loaded[0]
        try:
            catalog = Catalog(
                tuple(
                    ServedModel(
                        pipeline=pipeline,
                        max_images_per_request=settings.max_images_per_request,
                        max_timeout_s=settings.max_timeout_s,
                        default_timeout_s=settings.default_timeout_s or None,
                    )
                    for pipeline in pipelines
                )
            )
            engine = EngineGroup(
                [self._engine_of(pipelines, len(devices)) for pipelines in loaded],
                rebuild=lambda index: self._engine_of(self._load(devices[index]), len(devices)),
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
        self._show_loaded(pipelines, devices)
        self._catalog, self._engine = catalog, engine

    def _show_loaded(self, pipelines: Sequence[ServedPipeline], devices: Sequence[torch.device]) -> None:
        self.metrics.show_models(pipeline.name for pipeline in pipelines)
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

    def _engine_of(self, pipelines: Sequence[ServedPipeline], num_engines: int) -> Engine:
        settings = self.settings
        max_rows = settings.max_rows or _MAX_ROWS[pipelines[0].device.type]
        return Engine(
            {LaneName(pipeline.name): pipeline for pipeline in pipelines},
            max_rows=max_rows,
            max_queue_images=-(-settings.max_queue_images // num_engines),
            metrics=self.metrics,
            priority_aging_s=settings.priority_aging_s,
            batching=_batching(settings, max_rows),
        )

    def _devices(self) -> list[torch.device]:
        try:
            return serving_devices(self.settings.device, self.settings.gpus)
        except ValueError as error:
            raise StartupError(str(error)) from error

    def _load(self, device: torch.device) -> list[ServedPipeline]:
        # diffusers takes seconds to import: here the server answers its probes meanwhile.
        from model.pipeline import LaMambaPipeline

        adopt_library_logs()
        settings = self.settings
        pipelines: list[ServedPipeline] = []
        for folder in settings.models or _default_models():
            try:
                pipeline = LaMambaPipeline.load(
                    folder,
                    device=device,
                    dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
                    scan_backend=settings.scan_backend,
                    num_row_threads=settings.num_threads or available_cpu_threads(),
                    cuda_graphs=settings.cuda_graphs,
                    compile=settings.compile,
                )
            except ValueError as error:  # the pipeline's own words, which name the folder
                raise StartupError(one_line(error)) from error
            except Exception as error:  # whatever else a broken folder or a full device makes libraries raise
                _logger.debug("loading %s failed", folder, exc_info=True)
                raise StartupError(f"{folder}: {type(error).__name__}: {one_line(error)}") from error
            _logger.info(
                "loaded %s: %d px, %d classes, on %s in %s, scan backend %s",
                *(pipeline.name, pipeline.resolution, pipeline.num_classes),
                *(pipeline.device, str(pipeline.dtype).removeprefix("torch."), pipeline.scan_backend),
            )
            pipelines.append(pipeline)
        return pipelines


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


def _default_models() -> list[Path]:
    folders = [default_model_dir(resolution) for resolution in PRETRAINED_RESOLUTIONS]
    shipped = [folder for folder in folders if (folder / "model_index.json").is_file()]
    if not shipped:
        raise StartupError("models: none given and none shipped; name one by --models or LAMAMBA_MODELS")
    return shipped
