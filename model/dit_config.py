"""The architecture of a DiT (Peebles & Xie 2023, table 1), the peer of ours, as one frozen value.

Letters: d `hidden_size`, p `patch_size`, n `num_layers`, T = (sample_size / p)^2 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from model.config_fields import from_fields, require_flag, require_integer, require_probability

__all__ = ["DIT_PRESETS", "DiTConfig"]

_SIZES = {
    "S": {"hidden_size": 384, "num_layers": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "num_layers": 28, "num_heads": 16},
}
DIT_PRESETS = tuple(f"{size}/{patch}" for size in _SIZES for patch in (2, 4, 8))
"""The published sizes, with the side of their patches behind the stroke."""
_MINIMUM = {
    "sample_size": 1,
    "in_channels": 1,
    "patch_size": 1,
    "hidden_size": 4,
    "num_layers": 1,
    "num_heads": 1,
    "num_classes": 0,
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Every field of a DiT; ValueError names a bad field, its value and what is accepted."""

    sample_size: int = 32
    """Side of the latents."""
    in_channels: int = 4
    """Latent channels."""
    learn_sigma: bool = True
    """Predict ADM's variance interpolation beside eps: `2 * in_channels` output channels."""
    patch_size: int = 2
    """p, the side of a patch in latent pixels."""
    hidden_size: int = 384
    """d; a multiple of 4 (position table) and of `num_heads`."""
    num_layers: int = 12
    num_heads: int = 6
    num_classes: int = 1000
    """Classes; the label `num_classes` is the null class. 0 builds the unconditional network."""
    class_dropout_prob: float = 0.1
    """Probability that training replaces a label with the null class (classifier-free guidance)."""

    def __post_init__(self) -> None:
        for field, least in _MINIMUM.items():
            require_integer(field, getattr(self, field), least)
        require_flag("learn_sigma", self.learn_sigma)
        require_probability("class_dropout_prob", self.class_dropout_prob)
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: {self.hidden_size} given; a multiple of 4 is accepted")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: {self.num_heads} given; a divisor of hidden_size {self.hidden_size} is accepted"
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size: {self.sample_size} given; a multiple of {self.patch_size} is accepted"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published size `name` ("S/2" to "XL/8"), with any field replaced by `overrides`."""
        if not isinstance(name, str) or name.upper() not in DIT_PRESETS:
            raise ValueError(f"preset: {name!r} given; one of {', '.join(DIT_PRESETS)} is accepted")
        size, patch = name.upper().split("/")
        return cls.from_dict(_SIZES[size] | {"patch_size": int(patch)} | overrides)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """A configuration from plain fields; an unknown one raises ValueError."""
        return from_fields(cls, fields, "a DiT")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_tokens(self) -> int:
        """T, at the size of `sample_size`."""
        return (self.sample_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Channels of a head of attention."""
        return self.hidden_size // self.num_heads
