"""Which kernels a function spends its time in, by torch's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from model.benchmark.timing import Run

__all__ = ["kernel_table", "profile_kernels"]

_CALLS = 3
_NAME_CHARACTERS = 90


def profile_kernels(run: Run, device: torch.device) -> dict[str, Any]:
    """Kernels of one call, longest first: name, milliseconds, launches, share of all kernels' time.

    On a CPU the operators take the kernels' place, each without those that it calls.
    """
    cuda = device.type == "cuda"
    run()
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(_CALLS):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        if cuda and event.device_type.name != "CUDA":
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            kernels.append((event.key, microseconds / 1e3 / _CALLS, event.count / _CALLS))
    kernels.sort(key=lambda kernel: -kernel[1])
    total = sum(ms for _, ms, _ in kernels)
    return {
        "kernels_ms": round(total, 4),
        "launches": round(sum(launches for *_, launches in kernels)),
        "kernels": [
            {"name": name, "ms": round(ms, 4), "launches": round(launches, 1), "share": round(ms / total, 4)}
            for name, ms, launches in kernels
        ],
    }


def kernel_table(kernels: Sequence[dict[str, Any]], count: int = 30) -> str:
    """The first `count` kernels as text."""
    lines = [f"{'share':>7} {'ms':>9} {'launches':>9}  kernel"]
    lines += [
        f"{kernel['share']:7.1%} {kernel['ms']:9.3f} {kernel['launches']:9.1f}  "
        f"{kernel['name'][:_NAME_CHARACTERS]}"
        for kernel in kernels[:count]
    ]
    return "\n".join(lines) + "\n"
