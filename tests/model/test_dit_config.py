"""If this fails, the peer is another network than the published one, or a wrong field is found too late."""

from __future__ import annotations

from typing import Any

import pytest

from model.architecture import architecture_from_fields, saved_architecture
from model.config import LaMambaConfig
from model.dit_config import DiTConfig


@pytest.mark.parametrize(
    ("name", "hidden_size", "num_layers", "num_heads", "patch_size"),
    [
        ("S/2", 384, 12, 6, 2),
        ("b/4", 768, 12, 12, 4),
        ("L/2", 1024, 24, 16, 2),
        ("XL/8", 1152, 28, 16, 8),
    ],
)
def test_preset_is_the_published_size(
    name: str, hidden_size: int, num_layers: int, num_heads: int, patch_size: int
) -> None:
    config = DiTConfig.preset(name, num_classes=21)
    assert (config.hidden_size, config.num_layers, config.num_heads) == (hidden_size, num_layers, num_heads)
    assert (config.patch_size, config.num_tokens, config.num_classes) == (
        patch_size,
        (32 // patch_size) ** 2,
        21,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers: 0 given; an integer of at least 1 is accepted"),
        ({"hidden_size": 90}, "hidden_size: 90 given; a multiple of 4 is accepted"),
        ({"num_heads": 7}, "num_heads: 7 given; a divisor of hidden_size 384 is accepted"),
        ({"sample_size": 33}, "sample_size: 33 given; a multiple of 2 is accepted"),
        ({"class_dropout_prob": -0.1}, "class_dropout_prob: -0.1 given; 0 to 1 is accepted"),
        ({"class_dropout_prob": "a"}, "class_dropout_prob: 'a' given; 0 to 1 is accepted"),
        ({"learn_sigma": 1}, "learn_sigma: 1 given; true or false is accepted"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_what_is_accepted(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "unet"}, "kind: 'unet' given; one of lamamba, dit is accepted"),
        ({"kind": "dit", "preset": "S"}, "preset: 'S' given; one of S/2, S/4"),
        ({"kind": "dit", "d_state": 1}, "d_state: unknown field of a DiT; it has sample_size"),
        ({"kind": "dit", "heads": 1}, "heads: unknown field of a DiT; did you mean num_heads?"),
        ({"depths": [2], "heads": 1}, "heads: unknown field of the network; did you mean num_heads?"),
        ({"presett": "S"}, "presett: unknown field of the network; did you mean preset?"),
        ({"kind": ["dit"]}, r"kind: \['dit'\] given; one of lamamba, dit is accepted"),
    ],
    ids=["kind", "preset", "dit-field", "dit-near", "lamamba-field", "own-field", "list"],
)
def test_architecture_from_fields_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture_from_fields(fields)


def test_architecture_from_fields_prefers_what_is_said_to_the_preset() -> None:
    assert architecture_from_fields({"preset": "S", "qk_norm": True}) == LaMambaConfig.preset(
        "S", qk_norm=True
    )
    fields = {"kind": "dit", "preset": "S/2", "patch_size": 4}
    assert architecture_from_fields(fields) == DiTConfig.preset("S/4")


def test_saved_architecture_reads_files_older_than_a_field() -> None:
    """As those of the shipped models, which know nothing of `qk_norm`."""
    saved = {"_class_name": "LaMambaDiff", "_diffusers_version": "0.36.0", "hidden_size": 32, "num_heads": 2}
    assert saved_architecture(saved) == LaMambaConfig(hidden_size=32, num_heads=2, qk_norm=False)
    with pytest.raises(ValueError, match="_class_name: 'UNet' given; one of LaMambaDiff, DiT is accepted"):
        saved_architecture({"_class_name": "UNet"})
