"""If this fails, a preset is another network than the published one, or a wrong field is found too late."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from model.config import LaMambaConfig, dt_rank


@pytest.mark.parametrize(
    ("name", "hidden_size", "depths", "bottleneck_depth", "num_heads"),
    [
        ("S", 96, (2, 2, 2, 0), 1, 8),
        ("B", 192, (2, 2, 2, 0), 1, 8),
        ("L", 264, (2, 2, 2, 2), 2, 8),
        ("XL", 320, (2, 2, 2, 2), 2, 16),
    ],
)
def test_preset_is_the_published_size(
    name: str, hidden_size: int, depths: tuple[int, ...], bottleneck_depth: int, num_heads: int
) -> None:
    config = LaMambaConfig.preset(name.lower())
    assert (config.hidden_size, config.depths) == (hidden_size, depths)
    assert (config.bottleneck_depth, config.num_heads) == (bottleneck_depth, num_heads)
    assert (config.d_state, config.window_size, config.num_classes) == (1, 8, 1000)


def test_preset_takes_overrides_and_names_what_there_is() -> None:
    config = LaMambaConfig.preset("XL", d_state=16, sample_size=64)
    assert (config.hidden_size, config.d_state, config.grid_side) == (320, 16, 64)
    with pytest.raises(ValueError, match="preset: 'M' given; one of S, B, L, XL is accepted"):
        LaMambaConfig.preset("M")


def test_stages_have_the_widths_and_sides_of_figure_3() -> None:
    config = LaMambaConfig.preset("S")
    assert [(stage.width, stage.side_divisor, stage.depth) for stage in config.encoder_stages] == [
        (96, 1, 2),
        (192, 2, 2),
        (384, 4, 2),
        (384, 4, 0),
    ]
    assert [stage.depth for stage in config.decoder_stages] == [0, 3, 3, 3]
    assert config.conditioning_size == 384
    assert config.side_multiple == 4


@pytest.mark.parametrize(
    ("num_downsamplings", "widths", "divisors"),
    [(1, [8, 16, 16], [1, 2, 2]), (2, [8, 16, 32, 32], [1, 2, 4, 4]), (3, [8, 16, 32, 64], [1, 2, 4, 8])],
)
def test_downsamplings_set_the_stages_of_table_4(
    num_downsamplings: Any, widths: list[int], divisors: list[int]
) -> None:
    depths = (1,) * len(widths)
    config = LaMambaConfig(hidden_size=8, num_downsamplings=num_downsamplings, depths=depths)
    assert [stage.width for stage in config.encoder_stages] == widths
    assert [stage.side_divisor for stage in config.encoder_stages] == divisors


def test_the_symmetric_decoder_and_the_isotropic_layout() -> None:
    symmetric = LaMambaConfig(decoder_extra_block=False)
    assert [stage.depth for stage in symmetric.decoder_stages] == [0, 2, 2, 2]
    isotropic = LaMambaConfig(layout="isotropic", depths=(8,), bottleneck_depth=0, patch_size=8)
    assert isotropic.decoder_stages == ()
    assert (isotropic.grid_side, isotropic.conditioning_size) == (4, 96)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": 30}, "sample_size: 30 given; a multiple of 4 is accepted"),
        ({"sample_size": 36, "patch_size": 2}, "sample_size: 36 given; a multiple of 8 is accepted"),
        ({"sample_size": 32.0}, "sample_size: 32.0 given; an integer of at least 1"),
        ({"hidden_size": 90}, "hidden_size: 90 given; a multiple of 4 is accepted"),
        ({"num_heads": 7}, "num_heads: 7 given; a divisor of hidden_size 96 is accepted"),
        ({"d_state": 0}, "d_state: 0 given; an integer of at least 1 is accepted"),
        ({"num_classes": True}, "num_classes: True given; an integer of at least 0 is accepted"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob: 1.5 given; 0 to 1 is accepted"),
        ({"vssm": "snake"}, "vssm: 'snake' given; one of ss2d_continuous, ss2d"),
        ({"attention": "local"}, "attention: 'local' given; one of shifted_window, window"),
        ({"qk_norm": 1}, "qk_norm: 1 given; true or false is accepted"),
        ({"skip": "mul"}, "skip: 'mul' given; one of add, concat is accepted"),
        ({"layout": "vit"}, "layout: 'vit' given; one of unet, isotropic is accepted"),
        ({"num_downsamplings": 4}, "num_downsamplings: 4 given; one of 1, 2, 3 is accepted"),
        ({"depths": (2, 2, 2)}, "depths: .2, 2, 2. given; 4 counts of at least 1 are accepted"),
        ({"depths": (2, 0, 2, 2)}, "depths: .2, 0, 2, 2. given; .* of which the last may be 0"),
        ({"layout": "isotropic", "depths": (8,)}, "bottleneck_depth: 1 given; isotropic layouts accept 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_what_is_accepted(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaMambaConfig(**fields)


def test_from_dict_takes_json_and_names_an_unknown_field() -> None:
    config = LaMambaConfig.preset("S")
    fields = dataclasses.asdict(config) | {"depths": list(config.depths)}
    assert LaMambaConfig.from_dict(fields) == config
    with pytest.raises(ValueError, match="dim: unknown field of the network; it has sample_size"):
        LaMambaConfig.from_dict({"dim": 96})


@pytest.mark.parametrize(("width", "rank"), [(8, 1), (16, 1), (17, 2), (96, 6), (320, 20), (1280, 80)])
def test_dt_rank_is_a_sixteenth_of_the_width_rounded_up(width: int, rank: int) -> None:
    assert dt_rank(width) == rank
