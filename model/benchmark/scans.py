"""The selective scan alone, at the sizes of the network's stages: our backends and mamba-ssm's own function.

Four directions, random inputs, one scan a call. Ours take tokens in row-major order and give the sum over the
directions, so reading along the paths and adding up is in their time. `selective_scan_fn` takes the
directions as groups of channels that somebody has already put in scan order, and leaves the sum to others:
its time is of the recurrence alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.benchmark.config import BenchConfig, Shape, architecture
from model.benchmark.forward import AGREEMENT, DisagreementError, relative_rms
from model.benchmark.networks import DTYPES
from model.benchmark.timing import interleaved, milliseconds, percentiles, release
from model.config import dt_rank
from model.messages import one_line
from model.network.scan import resolve_scan_backend, scan_paths
from model.network.vssm import EXPAND

__all__ = ["measure_scans"]


def measure_scans(
    config: BenchConfig, shape: Shape, device: torch.device, deadline: float
) -> list[dict[str, Any]]:
    """One row for each stage of the network and each backend."""
    network = architecture(config.preset, shape.side, d_state=config.d_state)
    rows = []
    stages = dict.fromkeys((stage.width, stage.side_divisor) for stage in network.encoder_stages)
    for width, divisor in stages:
        common = {
            "numerics": config.numerics,
            "scope": "scan",
            "rows": shape.rows,
            "side": shape.side,
            "length": (shape.side // divisor) ** 2,
            "d_inner": EXPAND * width,
            "d_state": config.d_state,
            "directions": 4,
        }
        rows += _measure_stage(config, shape, divisor, common, device, deadline)
        release(device)
    return rows


def _measure_stage(
    config: BenchConfig,
    shape: Shape,
    divisor: int,
    common: dict[str, Any],
    device: torch.device,
    deadline: float,
) -> list[dict[str, Any]]:
    dtype = DTYPES[config.numerics]
    candidates: list[tuple[str, str, Callable[[], Callable[[], Tensor]]]] = []
    if "lamamba" in config.providers:
        side = shape.side // divisor
        tokens = _Tokens(shape.rows, side, common["d_inner"], config.d_state, device, dtype)
        candidates += [
            ("lamamba", backend, lambda backend=backend: tokens.scan(backend))  # type: ignore[misc]
            for backend in config.backends
        ]
    if "mamba-ssm" in config.providers:
        candidates.append(("mamba-ssm", "selective_scan_fn", lambda: _mamba_ssm_scan(common, device, dtype)))
    runs: dict[str, Callable[[], Tensor]] = {}
    skipped: dict[str, str] = {}
    facts: dict[str, dict[str, float]] = {}
    expected: Tensor | None = None
    for provider, name, prepare in candidates:
        if time.monotonic() > deadline:
            skipped[name] = "not run: the time was over"
            continue
        try:
            run = prepare()
            y = run().sum(2, dtype=torch.float32) if provider == "lamamba" else run()
        except Exception as error:  # out of memory, or whatever a kernel or a compiler fails with
            skipped[name] = one_line(error)
            continue
        runs[name] = run
        if provider == "lamamba":
            expected = y if expected is None else expected
            error_rms = relative_rms(y, expected)
            if not error_rms <= AGREEMENT[config.numerics]:
                raise DisagreementError(f"scan {name} differs at {common} by {error_rms:.2e} (relative RMS)")
            facts[name] = {"relative_rms": round(error_rms, 7)}
    samples, failures = interleaved(
        runs,
        milliseconds(device),
        repeats=config.repeats,
        variant_limit_s=config.variant_limit_s,
        deadline=deadline,
    )
    rows = []
    for provider, name, _ in candidates:
        row: dict[str, Any] = {"provider": provider, "preset": config.preset, "variant": name, **common}
        reason = skipped.get(name) or failures.get(name)
        if reason is not None:
            rows.append(row | {"skipped": reason})
            continue
        timed = samples[name]
        row |= percentiles(timed.ms) | {"repeats": len(timed.ms), "calls": timed.calls}
        rows.append(row | facts.get(name, {}))
    return rows


class _Tokens:
    """Arguments of `scan.reference.selective_scan` at one stage, as the network's block gives them."""

    def __init__(
        self, rows: int, side: int, d_inner: int, d_state: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.paths = scan_paths("ss2d_continuous", side, side).to(device)
        directions, length = len(self.paths), side**2
        normal, rank = _normal(device), dt_rank(d_inner // EXPAND)
        projected = normal(rows, length, directions, rank + 2 * d_state).to(dtype)
        dt, B, C = projected.split((rank, d_state, d_state), dim=-1)
        self._device = device
        self._inputs = (
            normal(rows, length, d_inner).to(dtype),
            dt,
            (normal(directions, d_inner, rank) * rank**-0.5).to(dtype),
            normal(directions, d_inner, d_state),
            B,
            C,
            normal(directions, d_inner),
            normal(directions, d_inner) - 4.0,
            self.paths,
        )

    def scan(self, backend: str) -> Callable[[], Tensor]:
        """What scans them with `backend`."""
        function = resolve_scan_backend(backend, self._device).selective_scan
        return lambda: function(*self._inputs)


def _mamba_ssm_scan(common: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """`selective_scan_fn` of `(batch, directions * d_inner, length)`, the directions as groups of B and C."""
    if device.type != "cuda" or find_spec("mamba_ssm") is None:
        raise RuntimeError("it needs a CUDA device and the package mamba-ssm")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    rows, length, d_state = common["rows"], common["length"], common["d_state"]
    directions, channels = common["directions"], common["directions"] * common["d_inner"]
    normal = _normal(device)
    u, delta = (normal(rows, channels, length).to(dtype) for _ in range(2))
    A = -torch.exp(normal(channels, d_state))
    B, C = (normal(rows, directions, d_state, length).to(dtype) for _ in range(2))
    D, delta_bias = normal(channels), normal(channels) - 4.0
    return lambda: selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


def _normal(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)
