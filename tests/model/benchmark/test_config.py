"""What a run measures: if this fails, a mistyped option measures something else than was asked for."""

from __future__ import annotations

import pytest

from model.benchmark.config import DEFAULT_SHAPES, BenchConfig, Shape, parse_shapes


def names(**fields: object) -> list[tuple[str, str]]:
    config = BenchConfig(shapes=(Shape(1, 32),), **fields)  # type: ignore[arg-type]
    return [(variant.provider, variant.name) for variant in config.selected_variants()]


def test_shapes_are_rows_by_side() -> None:
    assert parse_shapes("2x32, 16x64,2x32") == (Shape(2, 32), Shape(16, 64))
    sides = [shape.side for shape in parse_shapes(DEFAULT_SHAPES)]
    assert (sides.count(32), sides.count(64), sides.count(128)) == (6, 3, 3)


def test_default_variants_are_every_level_of_three_backends_and_of_the_peer() -> None:
    ours = [name for provider, name in names() if provider == "lamamba"]
    assert len(ours) == 12
    assert ours[:4] == [
        "triton/eager",
        "triton/eager+graph",
        "triton/compile-blocks",
        "triton/compile-blocks+graph",
    ]
    assert [name for provider, name in names() if provider == "dit"] == [
        "eager",
        "eager+graph",
        "compile",
        "compile+graph",
        "one-embedding/compile+graph",
    ]


def test_patterns_backends_and_providers_select() -> None:
    assert names(providers=("dit",), variants=("eager*",)) == [("dit", "eager"), ("dit", "eager+graph")]
    assert names(backends=("reference",), variants=("*/eager",), providers=("lamamba",)) == [
        ("lamamba", "reference/eager")
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": ()}, "shapes: none given"),
        ({"shapes": (Shape(1, 30),)}, "sample_size: 30 given"),
        ({"preset": "M"}, "preset: 'M' given"),
        ({"providers": ("sit",)}, "providers: 'sit' given"),
        ({"scopes": ("backward",)}, "scopes: 'backward' given"),
        ({"backends": ("cuda",)}, "backends: 'cuda' given"),
        ({"variants": ("triton/fast",)}, "variants: 'triton/fast' given"),
        ({"numerics": "fp8"}, "numerics: 'fp8' given"),
        ({"repeats": 0}, "repeats: 0 given"),
        ({"max_seconds": 0.0}, "max_seconds: 0 given"),
        ({"profile": "reference/eager"}, "profile: 'reference/eager' given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_field_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchConfig(**({"shapes": (Shape(1, 32),)} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["32", "0x32", "2x", "2x32x4", "axb"])
def test_a_bad_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ROWSxSIDE"):
        parse_shapes(text)
