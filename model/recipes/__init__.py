"""Training recipes: TrainConfig's fields as YAML, known by name (`places-128`) or by path.

A file holds one recipe, called as the file is; a file of the package may hold several by name instead, under
`recipes`. A recipe may say in `summary` what it is for, and name another as its `base`, whose fields it has
but for its own; those of `network` replace one by one. Its `name` is its own and its `output_dir` is
`runs/NAME` where it does not say otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from model.messages import one_line

__all__ = ["load_recipe", "recipe_names", "recipe_summaries"]


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; to YAML 1.1, which asks for 1.0e-3, it is text. A key that
    stands twice is an error, as both standards say: of its values PyYAML would drop one.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_NOT_FIELDS = ("summary", "base")
# What is raised beside: for bytes that are no text, dates that do not exist, tags of another type, depth.
_UNREADABLE = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(_packaged())


def recipe_summaries() -> dict[str, str]:
    """What each recipe of the package is for, by its name."""
    return {name: str(recipe["summary"]) for name, recipe in sorted(_packaged().items())}


def load_recipe(name_or_file: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe's fields with `key=value` overrides; `network.hidden_size=64` reaches into a nested field.

    Raises ValueError for an unknown recipe or base, unreadable YAML, or an override other than key=YAML.
    """
    fields = _with_base(name_or_file, _packaged(), seen=())
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
        try:
            target[leaf] = yaml.load(value, _Loader)
        except _UNREADABLE as error:
            raise ValueError(
                f"override: {override!r} given, whose value is no YAML: {one_line(error)}"
            ) from error
    return fields


def _with_base(
    name_or_file: str, packaged: dict[str, dict[str, Any]], seen: tuple[str, ...]
) -> dict[str, Any]:
    if name_or_file in seen:
        raise ValueError(f"base: {' -> '.join((*seen, name_or_file))}; recipes must not be their own base")
    recipe = packaged.get(name_or_file) or _read(Path(name_or_file))
    name = Path(name_or_file).stem
    own: dict[str, Any] = {"name": name, "output_dir": f"runs/{name}"}
    own |= {field: value for field, value in recipe.items() if field not in _NOT_FIELDS}
    if recipe.get("base") is None:
        return own
    base = _with_base(str(recipe["base"]), packaged, (*seen, name_or_file))
    networks = [fields["network"] for fields in (base, own) if isinstance(fields.get("network"), dict)]
    merged = {"network": networks[0] | networks[1]} if len(networks) == 2 else {}
    return base | own | merged


def _packaged() -> dict[str, dict[str, Any]]:
    recipes: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        contents = _read(path)
        recipes |= contents.get("recipes", {path.stem: contents})
    return recipes


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        names = ", ".join(recipe_names())
        raise ValueError(f"config: {str(path)!r} given; a file or one of {names} is accepted") from error
    except (OSError, *_UNREADABLE) as error:
        raise ValueError(f"config: {path} cannot be read: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"config: {path} holds no mapping of fields")
    return fields
