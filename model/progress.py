"""The progress display of long commands: one line a task, counted in whole numbers."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress_display"]


def progress_display(*, shown: bool = True) -> Progress:
    """Description, bar, done/total, time so far and time left; shown inside `with`, or never."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
