"""Words of other libraries' errors, fit for a message of ours. Nothing here imports more than Python."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(error: BaseException, max_characters: int = 300) -> str:
    """What an error says, on one line and never long; its type's name where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:max_characters]
