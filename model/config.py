"""The architecture of a LaMamba-Diff network as one frozen value: presets S, B, L, XL and every ablation as a
field.

Letters (paper, section 3): D `hidden_size`, R the token grid's side `sample_size / patch_size`, N `d_state`,
M `window_size`. Widths and sides of the stages follow from the fields and are computed here, in one place.
The released code and the paper differ in a few sizes; `docs/numerics.md` lists them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from model.config_fields import (
    from_fields,
    require_choice,
    require_flag,
    require_integer,
    require_probability,
)

VSSM = Literal["ss2d_continuous", "ss2d", "vim", "local_mamba", "es2d"]
Attention = Literal["shifted_window", "window", "global", "none"]

VSSM_KINDS: tuple[str, ...] = ("ss2d_continuous", "ss2d", "vim", "local_mamba", "es2d")
ATTENTION_KINDS: tuple[str, ...] = ("shifted_window", "window", "global", "none")

# Widths as multiples of D and sides as divisors of R, stage by stage, keyed by down-samplings (Table 4).
_WIDTH_FACTORS = {1: (1, 2, 2), 2: (1, 2, 4, 4), 3: (1, 2, 4, 8)}
_SIDE_DIVISORS = {1: (1, 2, 2), 2: (1, 2, 4, 4), 3: (1, 2, 4, 8)}


@dataclass(frozen=True)
class Stage:
    """One level of the U-Net: `depth` blocks of `width` channels, `R / side_divisor` tokens a side."""

    width: int
    side_divisor: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class LaMambaConfig:
    """Every field of a LaMamba-Diff network; ValueError names a bad field, its value and what is accepted."""

    sample_size: int = 32
    """Side of the latents: 32 at 256 px, 64 at 512 px, 128 at 1024 px under an f8 autoencoder."""
    in_channels: int = 4
    """Latent channels."""
    learn_sigma: bool = True
    """Predict ADM's variance interpolation beside eps: `2 * in_channels` output channels."""
    patch_size: int = 1
    """Side of a patch in latent pixels."""
    hidden_size: int = 96
    """D, the width of the first stage; a multiple of 4 (position table) and of `num_heads`."""
    depths: tuple[int, ...] = (2, 2, 2, 0)
    """Blocks in each encoder stage; a last 0 gives the three-stage layout of S and B; isotropic: one."""
    bottleneck_depth: int = 1
    """Blocks between encoder and decoder."""
    decoder_extra_block: bool = True
    """Decoder stages have one block more than their encoder stage (off: Table 4, "Decoder -1")."""
    num_classes: int = 1000
    """Classes; the label `num_classes` is the null class. 0 builds the unconditional network."""
    class_dropout_prob: float = 0.1
    """Probability that training replaces a label with the null class (classifier-free guidance)."""
    d_state: int = 1
    """N, the SSM's state size: 1 in the released configuration; the paper's GFLOPs were counted with 16."""
    conv_bias: bool = False
    """Bias in SS2D's depthwise convolution."""
    vssm: VSSM = "ss2d_continuous"
    """The visual state space module (supplementary Table 5)."""
    scan_window_size: int = 4
    """Window side of `vssm="local_mamba"`."""
    num_heads: int = 8
    """Attention heads, the same in every stage."""
    window_size: int = 8
    """M, the attention window's side in tokens; a smaller grid is one window."""
    attention: Attention = "shifted_window"
    """Local attention, or an ablation of Table 3: unshifted windows, one global window, none."""
    qk_norm: bool = False
    """RMSNorm of attention's queries and keys (arXiv 2302.05442), which bounds its logits; the paper has
    none.
    """
    layout: Literal["unet", "isotropic"] = "unet"
    """U-Net, or blocks of one width without resampling and skips (Table 4, "Isotropic")."""
    num_downsamplings: Literal[1, 2, 3] = 2
    """Patch mergings in the encoder (Table 4)."""
    skip: Literal["add", "concat"] = "add"
    """How a decoder stage takes its skip (Table 4, "U-Net Shortcut")."""

    def __post_init__(self) -> None:
        if not isinstance(self.depths, list | tuple):
            raise ValueError(f"depths: {self.depths!r} given; a list of block counts is accepted")
        object.__setattr__(self, "depths", tuple(self.depths))
        for field, minimum in _MINIMUM.items():
            require_integer(field, getattr(self, field), minimum)
        require_choice("vssm", self.vssm, VSSM_KINDS)
        require_choice("attention", self.attention, ATTENTION_KINDS)
        require_choice("layout", self.layout, ("unet", "isotropic"))
        require_choice("num_downsamplings", self.num_downsamplings, (1, 2, 3))
        require_choice("skip", self.skip, ("add", "concat"))
        for field in ("learn_sigma", "conv_bias", "qk_norm"):
            require_flag(field, getattr(self, field))
        require_probability("class_dropout_prob", self.class_dropout_prob)
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: {self.hidden_size} given; a multiple of 4 is accepted")
        if self.attention != "none" and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: {self.num_heads} given; a divisor of hidden_size {self.hidden_size} is accepted"
            )
        self._check_depths()
        if self.sample_size % (self.patch_size * self.side_multiple):
            multiple = self.patch_size * self.side_multiple
            raise ValueError(f"sample_size: {self.sample_size} given; a multiple of {multiple} is accepted")

    def _check_depths(self) -> None:
        stages = len(_WIDTH_FACTORS[self.num_downsamplings]) if self.layout == "unet" else 1
        valid = len(self.depths) == stages and all(isinstance(depth, int) for depth in self.depths)
        # An empty stage elsewhere would still own a decoder block in the authors' layout: refused as a
        # mistake.
        if self.layout == "isotropic" and self.bottleneck_depth:
            raise ValueError(f"bottleneck_depth: {self.bottleneck_depth} given; isotropic layouts accept 0")
        if not valid or min(self.depths[:3]) < 1 or min(self.depths) < 0:
            raise ValueError(
                f"depths: {list(self.depths)} given; {stages} counts of at least 1 are accepted"
                + (", of which the last may be 0" if stages == 4 else "")
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published size `name` ("S", "B", "L", "XL"), with any field replaced by `overrides`.

        XL is the released configuration; S and B are read off the paper; L is the nearest to its 449 M
        parameters.
        """
        presets = _presets()
        if not isinstance(name, str) or name.upper() not in presets:
            raise ValueError(f"preset: {name!r} given; one of {', '.join(presets)} is accepted")
        return cls.from_dict(presets[name.upper()] | overrides)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """A configuration from plain fields; an unknown one raises ValueError."""
        return from_fields(cls, fields, "the network")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid_side(self) -> int:
        """R, the side of the token grid."""
        return self.sample_size // self.patch_size

    @property
    def side_multiple(self) -> int:
        """What the sides of a token grid must be multiples of for the resampling alone."""
        return max(stage.side_divisor for stage in self.encoder_stages)

    @property
    def encoder_stages(self) -> tuple[Stage, ...]:
        """The encoder's stages from the full grid down; the isotropic layout has one."""
        if self.layout == "isotropic":
            return (Stage(self.hidden_size, 1, self.depths[0]),)
        factors = _WIDTH_FACTORS[self.num_downsamplings]
        divisors = _SIDE_DIVISORS[self.num_downsamplings]
        return tuple(
            Stage(self.hidden_size * factor, divisor, depth)
            for factor, divisor, depth in zip(factors, divisors, self.depths, strict=True)
        )

    @property
    def decoder_stages(self) -> tuple[Stage, ...]:
        """The decoder's stages from the coarse grid up, each the partner of an encoder stage."""
        if self.layout == "isotropic":
            return ()
        extra = int(self.decoder_extra_block)
        return tuple(
            Stage(stage.width, stage.side_divisor, stage.depth + extra if stage.depth else 0)
            for stage in reversed(self.encoder_stages)
        )

    @property
    def conditioning_size(self) -> int:
        """C, the width of the conditioning vector: that of the last stage."""
        return self.encoder_stages[-1].width


_MINIMUM = {
    "sample_size": 1,
    "in_channels": 1,
    "patch_size": 1,
    "hidden_size": 4,
    "bottleneck_depth": 0,
    "num_classes": 0,
    "d_state": 1,
    "scan_window_size": 1,
    "num_heads": 1,
    "window_size": 1,
}


def _presets() -> dict[str, dict[str, Any]]:
    three_stages: dict[str, Any] = {"depths": (2, 2, 2, 0), "bottleneck_depth": 1, "num_heads": 8}
    four_stages: dict[str, Any] = {"depths": (2, 2, 2, 2), "bottleneck_depth": 2}
    return {
        "S": {"hidden_size": 96} | three_stages,
        "B": {"hidden_size": 192} | three_stages,
        "L": {"hidden_size": 264, "num_heads": 8} | four_stages,
        "XL": {"hidden_size": 320, "num_heads": 16} | four_stages,
    }


def dt_rank(width: int) -> int:
    """r, the rank of SS2D's step-size projection in a block of `width` channels: ceil(width / 16)."""
    return math.ceil(width / 16)
