"""What torchrun says of this process and those that it started with it. Imports no more than Python.

Each raises ValueError for a variable that is not a number.
"""

from __future__ import annotations

import os

__all__ = ["launched_local_rank", "launched_local_size", "launched_rank", "launched_world_size"]


def launched_rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return _number("RANK", 0)


def launched_world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return _number("WORLD_SIZE", 1)


def launched_local_rank() -> int:
    """This process's number among those of this machine; 0 without torchrun."""
    return _number("LOCAL_RANK", 0)


def launched_local_size() -> int:
    """Processes that torchrun started on this machine; 1 without it."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"{name}: {value!r} in the environment; torchrun's number is accepted")
    return int(value)
