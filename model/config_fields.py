"""What configurations check alike: a mapping of their fields, and one value at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from model.messages import unknown_field

__all__ = [
    "from_fields",
    "is_number",
    "require_choice",
    "require_flag",
    "require_integer",
    "require_known",
    "require_probability",
]

_Config = TypeVar("_Config")


def from_fields(config: type[_Config], fields: Mapping[str, Any], owner: str) -> _Config:
    """The dataclass `config` of these fields.

    ValueError names one that `owner` has not, and near ones, or those that it needs.
    """
    known = dataclasses.fields(config)  # type: ignore[arg-type]  # a dataclass
    names = [field.name for field in known]
    require_known(fields, names, owner)
    missing = [
        field.name
        for field in known
        if field.name not in fields
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{missing[0]}: missing; {owner} needs {', '.join(missing)}")
    return config(**fields)


def require_known(fields: Iterable[object], known: Sequence[str], owner: str) -> None:
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(unknown_field(str(unknown[0]), known, owner))


def require_integer(field: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{field}: {value!r} given; an integer of at least {minimum} is accepted")


def require_choice(field: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{field}: {value!r} given; one of {', '.join(map(str, accepted))} is accepted")


def require_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{field}: {value!r} given; true or false is accepted")


def is_number(value: object) -> TypeGuard[int | float]:
    """True and False, which Python counts as integers, are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_probability(field: str, value: object) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{field}: {value!r} given; 0 to 1 is accepted")
