"""What an autoencoder training run does, as one validated value, and the module that it describes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from model.autoencoder import Autoencoder
from model.config_fields import is_number, require_flag, require_integer
from model.messages import unknown_field

__all__ = ["AutoencoderTrainingConfig", "build_autoencoder", "parse_settings"]

_POSTERIOR_STD = 0.01
_TEXT_FIELDS = {"initial_weights"}
_MAY_BE_INFINITE = {"max_seconds", "max_grad_norm"}
_SEEDS = 2**31
"""Step n of a run draws from seed * 2^32 + n, of 64 bits."""
_ARCHITECTURE = (
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig:
    """What a run does; written to its config.json."""

    block_out_channels: tuple[int, ...] = (32, 64, 96, 128)
    """Widths of the stages; each but the last halves the resolution."""
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 8
    initial_weights: str | None = None
    """Folder of an autoencoder of this architecture to begin from, instead of random weights."""
    train_encoder: bool = True
    """False: the decoder alone learns, and the latents stay exactly those of `initial_weights`, on which
    diffusion models may have been trained."""
    sizes: tuple[int, ...] = (128, 256)
    """Sides of the rendered views in pixels; a batch has equally many of each."""
    crop: int = 128
    """Side of what a step sees of a view, cut out at random: no size needs a compiled step of its own."""
    batch_size: int = 128
    max_seconds: float = 450.0
    """Training time; the learning rate falls to 0 over it."""
    max_images: int | None = None
    """If given, this many images end the run instead of `max_seconds`."""
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_weight: float = 1.0
    log_mse_weight: float = 0.05
    energy_weight: float = 0.3
    perceptual_weight: float = 1.0
    """0 leaves out the adversarial term too."""
    adversarial_ratio: float = 0.5
    """Norm of the adversarial term's gradient over that of the perceptual term's, at the reconstructions."""
    latent_noise: float = 0.15
    """Deviation of the noise in the latents of a batch's last image, where the latents' own is 1."""
    kl_weight: float = 0.05
    """Of the channels' distributions, mean and deviation, from N(0, 1)."""
    outlier_weight: float = 1.0
    outlier_sigmas: float = 3.0
    seed: int = 0
    compile: bool = True
    cuda_graph: bool = True
    """On CUDA, launch each step as one CUDA graph."""
    log_steps: int = 200
    checkpoint_seconds: float = 60.0
    evaluation_views: int = 500
    statistics_views: int = 4096

    def __post_init__(self) -> None:
        for name in ("layers_per_block", "latent_channels", "norm_num_groups", "log_steps", "batch_size"):
            require_integer(name, getattr(self, name), 1)
        for name in ("seed", "warmup_steps"):
            require_integer(name, getattr(self, name), 0)
        if self.seed >= _SEEDS:
            raise ValueError(f"seed: {self.seed} given; less than {_SEEDS} is accepted")
        for name in ("block_out_channels", "sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name}: () given; one or more integers are accepted")
            for value in getattr(self, name):
                require_integer(name, value, 1)
        for name in ("train_encoder", "compile", "cuda_graph"):
            require_flag(name, getattr(self, name))
        for name in (field.name for field in fields(self) if field.type == "float"):
            _require_number(name, getattr(self, name), may_be_infinite=name in _MAY_BE_INFINITE)
        if not isinstance(self.initial_weights, str | None):
            raise ValueError(f"initial_weights: {self.initial_weights!r} given; a folder is accepted")
        for name in ("evaluation_views", "statistics_views"):  # which come after all training
            require_integer(name, getattr(self, name), 1)
        if self.max_images is not None:
            require_integer("max_images", self.max_images, 1)
        factor = 2 ** (len(self.block_out_channels) - 1)
        for name, value in (("crop", self.crop), *(("sizes", size) for size in self.sizes)):
            if value < factor or value % factor:
                raise ValueError(f"{name}: {value} given; accepted are positive multiples of {factor}")
        if self.crop > min(self.sizes):
            raise ValueError(f"sizes: {self.sizes} given; accepted are sizes of at least crop, {self.crop}")
        if not self.train_encoder and self.initial_weights is None:
            raise ValueError(
                "train_encoder: False given without initial_weights; accepted is True, or a folder"
            )
        if self.batch_size % len(self.sizes):
            raise ValueError(
                f"batch_size: {self.batch_size} given; accepted are positive multiples of {len(self.sizes)}, "
                f"the number of sizes"
            )
        if any(width < 1 or width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"block_out_channels: {self.block_out_channels} given; accepted are positive multiples of "
                f"norm_num_groups, {self.norm_num_groups}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} given; accepted is 0 or more and less than 1")
        for name in ("max_seconds", "learning_rate", "max_grad_norm", "outlier_sigmas"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; accepted is more than 0")
        for name in (
            "gradient_weight",
            "log_mse_weight",
            "energy_weight",
            "perceptual_weight",
            "adversarial_ratio",
            "latent_noise",
            "kl_weight",
            "outlier_weight",
            "checkpoint_seconds",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; accepted is 0 or more")


def _require_number(field: str, value: object, *, may_be_infinite: bool) -> None:
    if not is_number(value) or math.isnan(value) or (value == math.inf and not may_be_infinite):
        raise ValueError(f"{field}: {value!r} given; a number is accepted")


def build_autoencoder(config: AutoencoderTrainingConfig) -> AutoencoderKL:
    """A fp32 AutoencoderKL without attention: of `initial_weights`, else random, a function of the seed.

    Its posterior has one small width everywhere, which training leaves as it is; an encoder that is not
    trained keeps its own.
    """
    stages = len(config.block_out_channels)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            sample_size=max(config.sizes),
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    if config.initial_weights is not None:
        _copy_weights(config.initial_weights, module)
    if not config.train_encoder:
        return module
    # Outputs of quant_conv: C means, then C log-variances.
    nn.init.zeros_(module.quant_conv.weight[config.latent_channels :])
    nn.init.constant_(module.quant_conv.bias[config.latent_channels :], 2 * math.log(_POSTERIOR_STD))
    return module


def _copy_weights(folder: str, module: AutoencoderKL) -> None:
    """Load the weights of the autoencoder in `folder`, whose latents are scaled by weights alone."""
    loaded = Autoencoder.load(folder).module
    unlike = [
        f"{name} {loaded.config[name]}"
        for name in (*_ARCHITECTURE, "scaling_factor", "shift_factor", "latents_mean", "latents_std")
        if _plain(loaded.config[name]) != _plain(module.config[name])
    ]
    if unlike:
        accepted = {name: _plain(module.config[name]) for name in _ARCHITECTURE}
        raise ValueError(
            f"initial_weights: {folder} with {', '.join(unlike)} given; accepted is an autoencoder with "
            f"{accepted} and latents that need no scaling"
        )
    module.load_state_dict(loaded.state_dict())


def _plain(value: Any) -> Any:
    """A config's value, sequences as tuples: read from JSON they are lists."""
    return tuple(value) if isinstance(value, list | tuple) else value


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Config fields from `name=value` texts, values as in JSON (lists become tuples)."""
    defaults = {field.name: field.default for field in fields(AutoencoderTrainingConfig)}
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in defaults:
            raise ValueError(unknown_field(name, sorted(defaults), "an autoencoder's training (--set)"))
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        is_text = isinstance(value, str) and name not in _TEXT_FIELDS
        if is_text or isinstance(value, dict) or isinstance(value, list) != isinstance(defaults[name], tuple):
            raise ValueError(f"set: {setting} given; accepted is a value like the default, {defaults[name]}")
        parsed[name] = tuple(value) if isinstance(value, list) else value
    return parsed
