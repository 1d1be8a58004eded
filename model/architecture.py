"""Which network a model has: the kinds that a run can train and a model folder can hold, as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import LaMambaConfig
from model.config_fields import require_known
from model.dit_config import DiTConfig

__all__ = [
    "NETWORK_KINDS",
    "Architecture",
    "architecture_fields",
    "architecture_from_fields",
    "saved_architecture",
    "saved_kind",
]

Architecture = LaMambaConfig | DiTConfig

NETWORK_KINDS: dict[str, type[LaMambaConfig] | type[DiTConfig]] = {"lamamba": LaMambaConfig, "dit": DiTConfig}
"""What a recipe calls a network, and its configuration."""
_CLASS_NAMES: dict[str, type[LaMambaConfig] | type[DiTConfig]] = {
    "LaMambaDiff": LaMambaConfig,
    "DiT": DiTConfig,
}


def architecture_from_fields(fields: dict[str, Any]) -> Architecture:
    """The architecture of a recipe's fields: `kind` (lamamba unless said), `preset`, and the fields of that
    kind, which come before the preset's.
    """
    others = dict(fields)
    kind = others.pop("kind", "lamamba")
    if not isinstance(kind, str) or kind not in NETWORK_KINDS:
        raise ValueError(f"kind: {kind!r} given; one of {', '.join(NETWORK_KINDS)} is accepted")
    config = NETWORK_KINDS[kind]
    known = [*(field.name for field in dataclasses.fields(config)), "kind", "preset"]
    require_known(fields, known, "a DiT" if kind == "dit" else "the network")
    preset = others.pop("preset", None)
    return config.from_dict(others) if preset is None else config.preset(preset, **others)


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """All fields, with the kind: what `architecture_from_fields` makes the same architecture of."""
    kind = next(name for name, config in NETWORK_KINDS.items() if isinstance(architecture, config))
    return {"kind": kind} | dataclasses.asdict(architecture)


def saved_kind(fields: dict[str, Any]) -> type[LaMambaConfig] | type[DiTConfig]:
    """Of which kind a saved network's config.json is; one without a class name is LaMamba-Diff's."""
    name = fields.get("_class_name", "LaMambaDiff")
    if name not in _CLASS_NAMES:
        raise ValueError(f"_class_name: {name!r} given; one of {', '.join(_CLASS_NAMES)} is accepted")
    return _CLASS_NAMES[name]


def saved_architecture(fields: dict[str, Any]) -> Architecture:
    """The architecture of a saved network's config.json, whose further entries are diffusers' own."""
    config = saved_kind(fields)
    own = {field.name for field in dataclasses.fields(config)}
    return config.from_dict({name: value for name, value in fields.items() if name in own})
