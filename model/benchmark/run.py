"""A run of `lamamba bench model` from its configuration to its files."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.benchmark.ceilings import measure_ceilings
from model.benchmark.config import BenchConfig
from model.benchmark.environment import device_slug, environment
from model.benchmark.forward import Forwards
from model.benchmark.kernels import kernel_table
from model.benchmark.networks import DTYPES
from model.benchmark.scans import measure_scans
from model.benchmark.summary import summary
from model.device import make_current
from model.whole_file import write_json

__all__ = ["compile_cache", "run_model_benchmark"]

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# torch gives up on a function that it has compiled 8 times; a network has more kinds of blocks than that, in
# each scan backend.
_RECOMPILE_LIMIT = 512


def run_model_benchmark(
    config: BenchConfig,
    device: torch.device,
    *,
    output_dir: Path,
    name: str | None = None,
    cache: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> tuple[Path, dict[str, Any]]:
    """Measure what `config` says, shape by shape; the results file and its content.

    The file is written again after every shape: what ends the program leaves the shapes before in it.

    Args:
        name: of the file; "model-" and the card's name by default.
        cache: a folder that torch.compile's results are kept in; None starts cold.
        report: is given each row as soon as its shape is done.

    Raises DisagreementError where variants of ours do not agree; the shapes before are in the file.
    """
    started = time.monotonic()
    deadline = started + (config.max_seconds or math.inf)
    make_current(device)
    path = output_dir / f"{name or f'model-{device_slug(device)}'}.json"
    with torch.inference_mode(), compile_cache(cache):
        ceilings = measure_ceilings(device, DTYPES[config.numerics])
        facts = environment() | {"device": str(device), "ceilings": ceilings}
        facts["compile_cache"] = "kept" if cache else "cold"
        forwards = Forwards(config, device, matmul_tflops=ceilings["matmul_tflops"])
        rows: list[dict[str, Any]] = []
        content: dict[str, Any] = {}
        for shape in config.shapes:
            new: list[dict[str, Any]] = []
            if time.monotonic() > deadline:
                new += forwards.not_run(shape, f"not run: over max_seconds {config.max_seconds:g}")
            else:
                if "forward" in config.scopes:
                    new += forwards.measure(shape, deadline)
                if "scan" in config.scopes:
                    new += measure_scans(config, shape, device, deadline)
            for row in new:
                report(row)
            rows += new
            seconds = round(time.monotonic() - started, 1)
            content = {
                "environment": facts | {"seconds": seconds},
                "results": rows,
                "summary": summary(rows),
            }
            write_json(path, content)
            _write_profiles(path, forwards.profiles)
    return path, content


@contextmanager
def compile_cache(folder: Path | None = None) -> Iterator[None]:
    """Have torch.compile keep its results in `folder`, or start cold from an empty one that is then removed.

    Also raises torch's limit on recompilation for the time of the block.
    """
    from torch._dynamo import config as dynamo_config  # seconds to import, like all of the compiler

    limits = dynamo_config.patch(
        recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=8 * _RECOMPILE_LIMIT
    )
    before = os.environ.get(_CACHE)
    with limits, tempfile.TemporaryDirectory(prefix="lamamba-bench-", ignore_cleanup_errors=True) as empty:
        os.environ[_CACHE] = str(folder.resolve()) if folder else empty
        try:
            yield
        finally:
            os.environ.pop(_CACHE)
            if before is not None:
                os.environ[_CACHE] = before


def _write_profiles(path: Path, profiles: list[dict[str, Any]]) -> None:
    for facts in profiles:
        variant = facts["variant"].replace("/", "-").replace("+", "-")
        name = f"{path.stem}-profile-{variant}-{facts['rows']}x{facts['side']}"
        write_json(path.with_name(f"{name}.json"), facts)
        heading = (
            f"{facts['provider']} {facts['variant']}, {facts['rows']}x{facts['side']}, {facts['numerics']}: "
            f"{facts['kernels_ms']:.2f} ms in {facts['launches']} launches\n"
        )
        path.with_name(f"{name}.txt").write_text(heading + kernel_table(facts["kernels"]), encoding="utf-8")
