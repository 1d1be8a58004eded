"""docs/settings.md from the Settings class: `make docs` writes it, a test keeps the two equal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

import annotated_types

from service.settings import ENVIRONMENT_PREFIX, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["settings_page"]

_HEAD: Final = """# Settings

Written by `make docs` from `service/settings.py`. Each setting is an environment variable; those that
`lamamba serve --help` lists are options too, which win. A variable that begins with `LAMAMBA_` and is no
setting stops the start.

| variable | accepted | default | |
|---|---|---|---|
"""
_KINDS: Final = {"int": "integer", "float": "number", "bool": "true, false", "str": "text"}


def settings_page() -> str:
    """The page, in Markdown."""
    return _HEAD + "".join(_row(name, field) for name, field in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    cells = (
        f"`{ENVIRONMENT_PREFIX}{name.upper()}`",
        _accepted(field),
        _default(field.default),
        (field.description or "").replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |\n"


def _accepted(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    kind = _KINDS.get(getattr(field.annotation, "__name__", ""), "text")
    return " ".join([kind, *_bounds(field.metadata)])


def _bounds(metadata: list[Any]) -> list[str]:
    bounds = []
    for constraint in metadata:
        match constraint:
            case annotated_types.Ge(ge):
                bounds.append(f"from {ge}")
            case annotated_types.Gt(gt):
                bounds.append(f"above {gt}")
            case annotated_types.Le(le):
                bounds.append(f"up to {le}")
    return bounds


def _default(value: object) -> str:
    if value is None or value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(settings_page(), encoding="utf-8")
