"""Energy of repeated calls, from the card's own counter (NVML), where the package nvidia-ml-py is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from model.benchmark.timing import Run

__all__ = ["energy_counter", "joules"]

_WARMUP_S = 0.3  # the counter is renewed about ten times a second, and the clock settles in that time
_CALLS_BETWEEN_WAITS_S = 0.05


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """What reads the joules that the card has used since its driver was loaded; None where nothing does."""
    if device.type != "cuda" or find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3


def joules(run: Run, counter: Callable[[], float], *, seconds: float, call_ms: float) -> float:
    """Joules of the whole card a call, over about `seconds` of calls without a pause.

    `call_ms` is about what a call takes: the host waits for the device every 50 ms, not at every call.
    """
    calls = max(1, round(1e3 * _CALLS_BETWEEN_WAITS_S / call_ms))
    _keep_running(run, calls, _WARMUP_S)
    before = counter()
    total = _keep_running(run, calls, seconds)
    return (counter() - before) / total


def _keep_running(run: Run, calls: int, seconds: float) -> int:
    """How many calls `seconds` took, in groups of `calls`."""
    started, total = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        total += calls
    return total
