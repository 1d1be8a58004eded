"""Triton where it is installed. A torch for CPUs comes without it: kernels are then plain functions that
nobody calls (`scan.triton_scan.is_available` says so), in modules that can be imported all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

__all__ = ["jit", "tl"]

tl: Any
"""`triton.language`."""

if find_spec("triton") is not None:
    import triton
    import triton.language

    tl = triton.language
    jit: Callable[..., Any] = triton.jit
else:
    tl = None

    def jit(function: Callable[..., Any], **options: Any) -> Any:
        """Leaves a kernel as it is."""
        return function
