"""Keep the memory of freed tensors in the process.

glibc gives freed blocks of megabytes back to the system, which hands out zeroed pages for the next tensor of
that size: a third of the CPU time of a denoising step was page faults. The activations of a step have the
same sizes at every step, so what the last step freed is what the next one needs. Elsewhere than on glibc
nothing is changed.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Final

__all__ = ["keep_freed_memory"]

# mallopt's parameters (malloc.h) and what they are set to.
_TRIM_THRESHOLD: Final = (-1, 2**29)  # bytes free at the end of the heap before it shrinks
_MMAP_THRESHOLD: Final = (-3, 2**28)  # smaller blocks come from the heap, not from the system one by one
_ARENA_MAX: Final = (
    -8,
    1,
)  # one heap for all threads: others are cut into pieces of 64 MiB, which are unmapped


def keep_freed_memory() -> bool:
    """Set the allocator of the whole process so; True where that was possible.

    For programs, not for libraries: call it once, before the first large tensor. The process then keeps its
    peak of activations, up to 512 MiB, for as long as it lives.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*option) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX))
