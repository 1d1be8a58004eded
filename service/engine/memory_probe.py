"""How many rows a step can have in a GPU's memory: measured at few rows, computed for many.

    bytes of a step of R rows  =  fixed + R * per_row               two measurements give both
    needed                     =  what a step of the largest model takes at once
                                  + with CUDA graphs, as much again for each model: a graph keeps its own
                                  + a batch of the decoder, which runs beside the steps; graphs: each model's

A share of the free memory stays free, and not less than a certain amount, for what the measurements do not
see: the graphs themselves, the gaps between blocks, libraries' kernels and workspaces.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from model.captured_steps import CAPTURED_SIZES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from service.engine.pipeline import ServedPipeline

__all__ = ["MAX_PROBED_ROWS", "StepMemory", "fitting_rows", "probe_max_rows"]

MAX_PROBED_ROWS: Final = 128
"""More rows raise a GPU's throughput by little, and each step's time by as much as they are more."""
_KEPT_FREE: Final = 0.1
_LEAST_KEPT_FREE_BYTES: Final = 192 * 2**20
_SMALL_IMAGES: Final = 1
_LARGE_IMAGES: Final = (8, 4, 2)
"""Those of the second measurement, fewer where they do not fit."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that the steps of one model take beside what is loaded."""

    fixed: float
    per_row: float

    @classmethod
    def between(cls, rows: int, num_bytes: float, more_rows: int, more_bytes: float) -> StepMemory:
        """The line through two measurements; neither of its terms is below 0."""
        per_row = max(0.0, (more_bytes - num_bytes) / (more_rows - rows))
        return cls(fixed=max(0.0, num_bytes - rows * per_row), per_row=per_row)


def fitting_rows(
    steps: Collection[StepMemory], *, free_bytes: float, decode_bytes: Collection[float], captured: bool
) -> int:
    """The most rows that fit, of those that fill a captured step: at least 2, at most `MAX_PROBED_ROWS`.

    Args:
        steps: one a model.
        free_bytes: with the models loaded.
        decode_bytes: of a batch of the decoder, one a model.
        captured: whether steps are CUDA graphs.

    Raises ValueError where not even two rows fit.
    """
    decoding = sum(decode_bytes) if captured else max(decode_bytes)

    def needed(rows: int) -> float:
        each = [step.fixed + rows * step.per_row for step in steps]
        return decoding + max(each) + (sum(each) if captured else 0.0)

    usable = free_bytes - max(_KEPT_FREE * free_bytes, _LEAST_KEPT_FREE_BYTES)
    candidates = [2 * size for size in CAPTURED_SIZES if 2 * size <= MAX_PROBED_ROWS]
    fitting = [rows for rows in candidates if needed(rows) <= usable]
    if not fitting:
        raise ValueError(
            f"max_rows: 0 given, and {free_bytes / 2**30:.2f} GiB are free beside the models; "
            f"2 rows and the decoder need {(needed(2) + free_bytes - usable) / 2**30:.2f}"
        )
    return max(fitting)


def probe_max_rows(pipelines: Iterable[ServedPipeline], *, decode_batch: int, captured: bool) -> int:
    """`fitting_rows` of loaded models, which are run for it. They are on one CUDA device.

    Raises ValueError as that does.
    """
    models = list(pipelines)
    device = models[0].device
    with torch.cuda.device(device):
        steps = [_step_memory(pipeline) for pipeline in models]
        decode_bytes = [pipeline.decode_bytes(decode_batch) for pipeline in models]
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    rows = fitting_rows(steps, free_bytes=free_bytes, decode_bytes=decode_bytes, captured=captured)
    _logger.info(
        "%s: %.1f of %.1f GiB free, up to %.0f MiB a row, %.0f MiB to decode: max_rows is %d",
        *(device, free_bytes / 2**30, total_bytes / 2**30),
        *(max(step.per_row for step in steps) / 2**20, max(decode_bytes) / 2**20, rows),
    )
    return rows


def _step_memory(pipeline: ServedPipeline) -> StepMemory:
    rows_per_image = 2 if pipeline.num_classes else 1
    try:
        small = pipeline.step_bytes(_SMALL_IMAGES)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"max_rows: 0 given, and {pipeline.device} has no memory for one image of {pipeline.name}"
        ) from error
    for num_images in _LARGE_IMAGES:
        try:
            large = pipeline.step_bytes(num_images)
        except torch.OutOfMemoryError:
            _logger.info("%s: no memory for a step of %d images", pipeline.name, num_images)
            continue
        return StepMemory.between(rows_per_image * _SMALL_IMAGES, small, rows_per_image * num_images, large)
    return StepMemory(fixed=0.0, per_row=small / (rows_per_image * _SMALL_IMAGES))
