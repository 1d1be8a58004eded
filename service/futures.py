"""Futures that fail when nobody waits for them any longer."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["mark_seen"]


def mark_seen(future: asyncio.Future[Any]) -> None:
    """A done callback of a future whose failure is told elsewhere: asyncio need not log that nobody heard."""
    if not future.cancelled():
        future.exception()
