"""Words for messages that several modules have. Nothing here imports more than Python."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["one_line", "unknown_field"]


def one_line(error: BaseException, max_characters: int = 300) -> str:
    """What an error says, on one line and never long; its type's name where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:max_characters]


def unknown_field(name: str, known: Iterable[str], owner: str) -> str:
    """What to say of a field that `owner` does not have: the nearest of those it has, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
    return f"{name}: unknown field of {owner}; {hint}"
