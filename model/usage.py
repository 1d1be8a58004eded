"""How a command refuses: one line that names what was given and what is accepted, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def usage_errors(*, quiet: bool = False) -> Iterator[None]:
    """Turn a ValueError into that line; anything else is a defect and keeps its traceback.

    `quiet`: without the line, which another process prints.
    """
    try:
        yield
    except ValueError as error:
        if not quiet:
            typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
