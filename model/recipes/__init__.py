"""Training recipes: YAML files of TrainConfig's fields, known by name (`places-128`) or by path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; to YAML 1.1, which asks for 1.0e-3, it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe's fields with `key=value` overrides; `network.hidden_size=64` reaches into a nested field.

    Raises ValueError for an unknown recipe, unreadable YAML, or an override without "=".
    """
    path = Path(__file__).parent / f"{name_or_file}.yaml"
    if not path.is_file():
        path = Path(name_or_file)
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        names = ", ".join(recipe_names())
        raise ValueError(f"config: {name_or_file!r} given; a file or one of {names} is accepted") from error
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"config: {path} holds no mapping of fields")
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override: {override!r} given; key=value is accepted")
        *parents, leaf = key.split(".")
        target = fields
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"override: {key!r} given; {parent!r} has no fields of its own")
        target[leaf] = yaml.load(value, _Loader)
    return fields
