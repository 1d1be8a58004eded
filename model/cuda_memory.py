"""How much of a GPU's memory a piece of work takes, by the count of torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` holds at once at most, beside what is allocated before it.

    It is called twice: what the first call makes for good (compiled kernels, workspaces) does not count.
    """
    run()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
