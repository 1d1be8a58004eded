"""What a run of `lamamba bench model` measures, as one validated value. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from model.config import LaMambaConfig
from model.dit_config import DiTConfig

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKENDS",
    "DEFAULT_SHAPES",
    "FORMS",
    "LEVELS",
    "PRESETS",
    "PROVIDERS",
    "SCOPES",
    "BenchConfig",
    "Shape",
    "Variant",
    "architecture",
    "comma_separated",
    "dit_architecture",
    "parse_shapes",
]

PROVIDERS = ("lamamba", "dit", "mamba-ssm")
SCOPES = ("forward", "scan")
NUMERICS = ("bf16", "fp32")
BACKENDS = ("triton", "mamba_cuda", "vectorized", "reference")
DEFAULT_BACKENDS = BACKENDS[:3]
"""The reference loops over tokens on the host: 170,000 launches a forward of XL, seconds each."""

LEVELS = ("eager", "compile-blocks", "compile", "max-autotune")
FORMS = ("", "one-embedding")
"""Of the peer: as diffusers has it, and with (t, y) embedded once a forward, as in DiT's own code."""

DEFAULT_SHAPES = "1x32,2x32,8x32,16x32,64x32,128x32,2x64,8x64,16x64,2x128,4x128,8x128"
PRESETS = ("S", "B", "L", "XL", "tiny")

# For dry runs on a CPU: three stages at sides from 8.
_TINY = {"hidden_size": 8, "depths": (1, 1, 1, 0), "num_heads": 2, "num_classes": 10}
_TINY_DIT = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_classes": 10}


class Shape(NamedTuple):
    """Rows of a batch and the side of their latents, in latent pixels."""

    rows: int
    side: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.side}"


@dataclass(frozen=True)
class Variant:
    """A network as it is run: whose, in which form, how far optimized."""

    provider: str
    form: str
    """The scan backend of ours; of the peer one of `FORMS`."""
    level: str
    """One of `LEVELS`: as it is, each repeated block compiled, the whole compiled, the same autotuned."""
    graph: bool
    """Replayed as one CUDA graph."""

    @property
    def name(self) -> str:
        """As in `--variants` and in results: "triton/compile-blocks+graph", "compile+graph"."""
        return "/".join(filter(None, (self.form, self.level))) + ("+graph" if self.graph else "")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Shapes, variants and limits of a run; ValueError names a bad field, its value and what is accepted."""

    preset: str = "XL"
    d_state: int = 1
    """N of ours: 1 in the released configuration, 16 in the paper's count of FLOPs."""
    shapes: tuple[Shape, ...]
    providers: tuple[str, ...] = PROVIDERS
    scopes: tuple[str, ...] = SCOPES
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    """Of ours."""
    variants: tuple[str, ...] = ()
    """Patterns of variants' names; none: eager and compiled, ours by blocks, with and without a graph."""
    numerics: str = "bf16"
    repeats: int = 30
    """Timed samples of each variant and shape."""
    variant_limit_s: float = 10.0
    """Of sampling one variant at one shape; no further samples after it, but at least 3."""
    max_seconds: float | None = None
    """After this, what is left is reported as not run. A compilation under way is not interrupted."""
    energy_seconds: float = 2.0
    """How long the best variant of each provider runs for its energy; 0: not at all."""
    profile: str | None = None
    """A variant's name: its kernels are listed at each shape."""

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("shapes: none given; ROWSxSIDE, with commas between, is accepted")
        for field, accepted in (("providers", PROVIDERS), ("scopes", SCOPES), ("backends", BACKENDS)):
            for value in getattr(self, field):
                _require_one_of(field, value, accepted)
        _require_one_of("preset", self.preset, PRESETS)
        _require_one_of("numerics", self.numerics, NUMERICS)
        if self.d_state < 1:
            raise ValueError(f"d_state: {self.d_state} given; 1 or more is accepted")
        if self.repeats < 1:
            raise ValueError(f"repeats: {self.repeats} given; 1 or more is accepted")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds: {self.max_seconds:g} given; more than 0 is accepted")
        if self.energy_seconds < 0:
            raise ValueError(f"energy_seconds: {self.energy_seconds:g} given; 0 or more is accepted")
        for shape in self.shapes:
            architecture(self.preset, shape.side, d_state=self.d_state)
        names = [variant.name for variant in _all_variants()]
        for pattern in self.variants:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"variants: {pattern!r} given, which none is called; {_VARIANTS_HELP}")
        if self.profile is not None and self.profile not in {v.name for v in self.selected_variants()}:
            raise ValueError(f"profile: {self.profile!r} given; a variant that is measured is accepted")

    def selected_variants(self) -> list[Variant]:
        """What is measured, a graph right after what it captures."""
        return [
            variant
            for variant in _all_variants()
            if variant.provider in self.providers
            and (variant.provider != "lamamba" or variant.form in self.backends)
            and (
                any(fnmatchcase(variant.name, pattern) for pattern in self.variants)
                if self.variants
                else _is_default(variant)
            )
        ]


_VARIANTS_HELP = (
    f"of ours there are ({', '.join(BACKENDS)})/({', '.join(LEVELS)}), of DiT the levels alone or with "
    "one-embedding/ before them, each also with +graph behind; * and ? match"
)


def architecture(preset: str, side: int, *, d_state: int = 1) -> LaMambaConfig:
    """Our network of `preset` for latents of `side`; ValueError for a side that it does not fit."""
    fields = {"sample_size": side, "d_state": d_state}
    if preset == "tiny":
        return LaMambaConfig.from_dict(_TINY | fields)
    return LaMambaConfig.preset(preset, **fields)


def dit_architecture(preset: str, side: int) -> DiTConfig:
    """The peer of `preset`'s size with patches of 2; ValueError for a side that it does not fit."""
    if preset == "tiny":
        return DiTConfig.from_dict(_TINY_DIT | {"sample_size": side})
    return DiTConfig.preset(f"{preset}/2", sample_size=side)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """ "2x32,16x64" as shapes."""
    shapes = []
    for part in comma_separated(text):
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,3})", part)
        if match is None:
            raise ValueError(f"shapes: {part!r} given; ROWSxSIDE is accepted, e.g. 16x32")
        shapes.append(Shape(*map(int, match.groups())))
    return tuple(dict.fromkeys(shapes))


def comma_separated(text: str) -> tuple[str, ...]:
    """The parts of `text` between commas, without space around them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _all_variants() -> list[Variant]:
    forms = [("lamamba", backend) for backend in BACKENDS] + [("dit", form) for form in FORMS]
    return [
        Variant(provider, form, level, graph)
        for provider, form in forms
        for level in LEVELS
        for graph in (False, True)
    ]


def _is_default(variant: Variant) -> bool:
    if variant.provider == "lamamba":
        return variant.level in ("eager", "compile-blocks")
    if variant.form:
        return variant.level == "compile" and variant.graph
    return variant.level in ("eager", "compile")


def _require_one_of(field: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{field}: {value!r} given; one of {', '.join(accepted)} is accepted")
