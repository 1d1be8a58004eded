"""If this fails, long commands show nothing while they run."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from model.progress import progress_display


def test_progress_display_counts_in_whole_numbers() -> None:
    progress = progress_display()
    progress.add_task("encoding", total=200_000, completed=1_024)
    console = Console(file=StringIO(), width=120)
    console.print(progress.get_renderable())
    assert isinstance(console.file, StringIO)
    assert "encoding" in console.file.getvalue()
    assert "1,024/200,000" in console.file.getvalue()
