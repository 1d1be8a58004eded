"""Triton where it is installed, and what launches ask of the tensors they are given.

A torch for CPUs comes without Triton: kernels are then plain functions that nobody calls
(`scan.triton_scan.is_available` says so), in modules that can be imported all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["HAS_TRITON", "check_dtypes", "jit", "needs_gradient", "tl"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

tl: Any
"""`triton.language`."""

HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language

    tl = triton.language
    jit: Callable[..., Any] = triton.jit
else:
    tl = None

    def jit(function: Callable[..., Any], **options: Any) -> Any:
        """Leaves a kernel as it is."""
        return function


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, for a dtype that no kernel reads; None is not there."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _INPUT_DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} given; float32, bfloat16 or float16 is accepted")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded and one of the tensors wants its own; None is not there."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
