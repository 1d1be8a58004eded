"""What a training run is asked to do, as one validated value, and what of it a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from model.config import LaMambaConfig
from model.pretrained import default_model_dir

__all__ = ["SHIPPED_AUTOENCODER", "TrainConfig"]

SHIPPED_AUTOENCODER = "places"
"""The name by which a recipe asks for the autoencoder in the package."""

_FIXED_FIELDS = ("network", "resolution", "num_views", "batch_size", "seed")
_INTEGERS = {  # and their least values
    "resolution": 1,
    "num_views": 1,
    "num_images": 1,
    "batch_size": 1,
    "log_every": 1,
    "warmup_images": 0,
    "seed": 0,
}
_CHOICES = {
    "learning_rate_schedule": ("constant", "cosine"),
    "compile": ("none", "block", "full"),
    "gpu_dtype": ("bfloat16", "float16"),
    "cuda_graph": (False, True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. ValueError names a bad field, its value and what is accepted."""

    name: str
    """The model's name, by which the service will list it."""
    output_dir: str
    """The run's folder; a run found there is resumed."""
    autoencoder: str = SHIPPED_AUTOENCODER
    """The AutoencoderKL whose latents are learned: `places` for the shipped one, or a folder or hub id; a
    folder of that name is `./places`.
    """
    resolution: int
    """Side of the training images in pixels."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of LaMambaConfig; `preset: S|B|L|XL` may stand among them. `num_classes` follows from the data.
    """
    num_views: int = 200_000
    """Views of `places` in the latents cache."""
    num_images: int = 1_000_000
    """Images to train on in all."""
    batch_size: int = 256
    """Images in one optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant as in the paper, or a cosine to zero at `num_images`."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0; fewer than `num_images`."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = math.inf
    """Gradients are scaled down to this norm; inf leaves them."""
    ema_decay: float = 0.9999
    """Decay of the weights' moving average a step, reached from below as (1 + step) / (10 + step)."""
    seed: int = 0
    initial_weights: str | None = None
    """A model folder whose transformer the run starts from, with fresh optimizer moments."""
    gpu_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What GPUs will run the model in. float16 is eight times as exact, for networks whose activations stay
    far below 65504.
    """
    compile: Literal["none", "block", "full"] = "block"
    """On CUDA, torch.compile of each block, where like ones share the result (places-256: 6 for 13), or of
    the loss as a whole, which takes two to three times as long.
    """
    cuda_graph: bool = True
    """On CUDA, launch each step as one CUDA graph; without it the host is slower than the device."""
    scan_backend: str = "auto"
    state_every_s: float = 120.0
    """Seconds between saved states."""
    stop_after_s: float = math.inf
    """Save a state and stop after this many seconds; the same command goes on."""
    log_every: int = 50
    """Steps between log lines; only these wait for the device."""

    def __post_init__(self) -> None:
        for name in ("name", "output_dir", "autoencoder", "scan_backend"):
            self._require(name, _is_text(getattr(self, name)), "a text")
        given = self.initial_weights
        self._require("initial_weights", given is None or _is_text(given), "a model folder, or none,")
        is_mapping = isinstance(self.network, dict) and all(isinstance(key, str) for key in self.network)
        self._require("network", is_mapping, "a mapping of LaMambaConfig's fields")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, is_integer and value >= least, f"an integer of at least {least}")
        for name in ("learning_rate", "state_every_s"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0 < value < math.inf, "a finite number above 0")
        for name in ("max_grad_norm", "stop_after_s"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and value > 0, "a number above 0, or inf,")
        value = self.weight_decay
        is_valid = _is_number(value) and 0 <= value < math.inf
        self._require("weight_decay", is_valid, "a finite number of at least 0")
        self._require("ema_decay", _is_decay(self.ema_decay), "a number from 0 to below 1")
        betas = self.adam_betas
        is_valid = isinstance(betas, list | tuple) and len(betas) == 2 and all(map(_is_decay, betas))
        self._require("adam_betas", is_valid, "a pair of numbers from 0 to below 1")
        object.__setattr__(self, "adam_betas", tuple(betas))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            is_choice = any(value == choice and type(value) is type(choice) for choice in choices)
            self._require(name, is_choice, f"one of {', '.join(map(str, choices))}")
        is_shorter = self.warmup_images < self.num_images
        self._require("warmup_images", is_shorter, f"less than num_images, {self.num_images},")

    def _require(self, name: str, is_valid: bool, accepted: str) -> None:
        if not is_valid:
            raise ValueError(f"{name}: {getattr(self, name)!r} given; {accepted} is accepted")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """A configuration from plain values, as a recipe holds them; unknown and missing fields raise
        ValueError.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: unknown field; a training run has {', '.join(known)}")
        missing = [
            name
            for name, f in known.items()
            if name not in fields
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{missing[0]}: missing; a training run needs {', '.join(missing)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON's values, which compare equal after a way through a file."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    @property
    def autoencoder_source(self) -> str:
        """The folder or hub id that `autoencoder` stands for."""
        if self.autoencoder == SHIPPED_AUTOENCODER:
            return str(default_model_dir(256) / "vae")
        return self.autoencoder

    def network_config(self, *, num_classes: int, downsampling: int, in_channels: int) -> LaMambaConfig:
        """The network for this data and autoencoder."""
        fields = dict(self.network)
        fields |= {"num_classes": fields.get("num_classes", num_classes), "in_channels": in_channels}
        fields |= {"sample_size": self.resolution // downsampling}
        preset = fields.pop("preset", None)
        return LaMambaConfig.preset(preset, **fields) if preset else LaMambaConfig.from_dict(fields)

    def changes_since(self, earlier: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields (before, now) in which this run goes on otherwise than `earlier`, a `to_dict`, says.

        Raises ValueError for a field that must stay what it was: it would make another run's numbers.
        """
        fields = self.to_dict()
        changes = {
            name: (earlier.get(name), value) for name, value in fields.items() if earlier.get(name) != value
        }
        for name in _FIXED_FIELDS:
            if name in changes:
                before, now = changes[name]
                raise ValueError(
                    f"{name}: {now!r} given; the run in {self.output_dir} was started with {before!r}, "
                    "continue with that or choose another output_dir"
                )
        return changes


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_decay(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1
