"""How a command refuses: one line that names what was given and what is accepted, and exit code 2; and the
same of what the system refuses it: a folder that it may not write, a disk that is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from model.messages import one_line

__all__ = ["usage_errors"]


@contextmanager
def usage_errors(*, quiet: bool = False) -> Iterator[None]:
    """Turn a ValueError, an OSError or a device's lack of memory into that line; anything else is a defect
    and keeps its traceback.

    `quiet`: without the line of a ValueError, which another process prints.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output is gone: click ends the command without a word
    except OSError as error:
        where = f"{error.filename}: " if error.filename and error.strerror else ""
        typer.secho(f"lamamba: {where}{error.strerror or one_line(error)}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        import torch  # is there already where it ran out of memory; seconds for a command that needs it not

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        typer.secho(
            f"lamamba: the device has no memory for that; less at once may fit ({one_line(error)})",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(2) from error
    except ValueError as error:
        if not quiet:
            typer.secho(f"lamamba: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
