"""What a training run is asked to do, as one validated value, and what of it a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from model.architecture import Architecture, architecture_from_fields
from model.config_fields import from_fields, is_number
from model.limits import MAX_SEED
from model.pretrained import default_model_dir

__all__ = ["PLACES", "SHIPPED_AUTOENCODER", "TrainConfig"]

SHIPPED_AUTOENCODER = "places"
"""The name by which a recipe asks for the autoencoder in the package."""

PLACES = "places"
"""The name by which a recipe asks for the views in the package."""

_FIXED_FIELDS = (
    *("resolution", "num_views", "batch_size", "seed"),
    *("ema_tracks", "ema_track_interval"),
)
_INTEGERS = {  # and their least values
    "resolution": 1,
    "num_views": 1,
    "num_images": 1,
    "batch_size": 1,
    "log_every": 1,
    "warmup_images": 0,
    "seed": 0,
    "micro_batch_size": 0,
    "ema_track_interval": 1,
    "snapshot_every": 0,
    "keep_states": 1,
    "keep_state_every": 0,
    "sample_every": 0,
    "rollback_after_steps": 1,
    "max_rollbacks": 0,
}
_CHOICES = {
    "learning_rate_schedule": ("constant", "cosine"),
    "timestep_density": ("uniform", "logit_normal"),
    "compile": ("none", "block", "full"),
    "gpu_dtype": ("bfloat16", "float16"),
    "cuda_graph": (False, True),
    "parallel": ("auto", "none", "ddp", "fsdp"),
    "activation_checkpointing": (False, True),
    "async_save": (False, True),
    "tensorboard": (False, True),
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
    data: str = PLACES
    """`places`, the views in the package, or a folder that `lamamba prepare-latents` wrote."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of LaMambaConfig, or with `kind: dit` of DiTConfig. `preset` may stand among them: S, B, L or
    XL, of a DiT S/2 to XL/8. `num_classes`, unless 0, `in_channels` and `sample_size` follow from the data.
    """
    num_views: int = 200_000
    """Views of `places` in the latents cache."""
    num_images: int = 1_000_000
    """Images to train on in all."""
    batch_size: int = 256
    """Images in one optimizer step, of all processes together."""
    micro_batch_size: int = 0
    """Images that a process computes at a time, whose gradients add up to the step's; 0: its whole part."""
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
    ema_tracks: tuple[float, ...] = ()
    """Further averages, of these lengths: standard deviations as shares of the training so far. With two,
    0.05 and 0.1, `lamamba export --sigma-rel` makes other lengths of the snapshots.
    """
    ema_track_interval: int = 8
    """Steps from one update of the tracks to the next: each moves as many bytes as the EMA."""
    snapshot_every: int = 0
    """Images from one snapshot of the tracks, in fp16, to the next; 0: none."""
    timestep_density: Literal["uniform", "logit_normal"] = "uniform"
    """How often each timestep is trained on: equally, as in the paper, or by `logit_normal`."""
    logit_normal: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation, above 0, of log(t / (T - t)) of the logit-normal density."""
    min_snr_gamma: float = math.inf
    """eps's error is weighted by min(SNR, gamma) / SNR (arXiv 2303.09556 has 5); inf leaves it, as the paper.
    """
    seed: int = 0
    initial_weights: str | None = None
    """A model folder whose transformer the run starts from, with fresh optimizer moments."""
    gpu_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What GPUs will run the model in. float16 is eight times as exact, for networks whose activations stay
    far below 65504.
    """
    compile: Literal["none", "block", "full"] = "block"
    """On CUDA, torch.compile of each block, where like ones share the result (places-256: 6 for 13), or of
    the loss as a whole, which takes two to three times as long and which fsdp does not have.
    """
    cuda_graph: bool = True
    """On CUDA, launch each step as one CUDA graph (ddp: two): the host can be slower than the device."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How torchrun's processes share the work: ddp has all parameters on each, fsdp a shard. auto: ddp."""
    activation_checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping what they computed."""
    rank_timeout_s: float = 600.0
    """A process that is silent for so long is taken for lost, and the run ends."""
    scan_backend: str = "auto"
    state_every_s: float = 300.0
    """Seconds between saved states."""
    keep_states: int = 2
    """Saved states that are kept, the newest."""
    keep_state_every: int = 0
    """Beside those, the first state of each so many images is kept for good; 0: none."""
    async_save: bool = False
    """Go on while a state is written; it takes the host's memory for one more."""
    stop_after_s: float = math.inf
    """Save a state and stop after this many seconds; the same command goes on."""
    log_every: int = 50
    """Steps between log lines; only these wait for the device."""
    rollback_after_steps: int = 100
    """After so many steps in a row without finite gradients, go back to the newest state's weights."""
    max_rollbacks: int = 3
    """After so many of those the run gives up. Saved states count them, a resumed run goes on counting."""
    sample_every: int = 500_000
    """Images from one grid of samples to the next; 0: none."""
    tensorboard: bool = True
    """Write the log for TensorBoard too, if it is installed."""
    wandb: str | None = None
    """A project of Weights & Biases to log to."""

    def __post_init__(self) -> None:
        for name in ("name", "output_dir", "autoencoder", "data", "scan_backend"):
            self._require(name, _is_text(getattr(self, name)), "a text")
        for name, accepted in (("initial_weights", "a model folder"), ("wandb", "a project's name")):
            given = getattr(self, name)
            self._require(name, given is None or _is_text(given), f"{accepted}, or none,")
        is_mapping = isinstance(self.network, dict) and all(isinstance(key, str) for key in self.network)
        self._require("network", is_mapping, "a mapping of the network's fields")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, is_integer and value >= least, f"an integer of at least {least}")
            self._require(name, value <= MAX_SEED, f"at most {MAX_SEED}")
        for name in ("learning_rate", "state_every_s", "rank_timeout_s"):
            value = getattr(self, name)
            self._require(name, is_number(value) and 0 < value < math.inf, "a finite number above 0")
        for name in ("max_grad_norm", "min_snr_gamma", "stop_after_s"):
            value = getattr(self, name)
            self._require(name, is_number(value) and value > 0, "a number above 0, or inf,")
        value = self.weight_decay
        is_valid = is_number(value) and 0 <= value < math.inf
        self._require("weight_decay", is_valid, "a finite number of at least 0")
        self._require("ema_decay", _is_decay(self.ema_decay), "a number from 0 to below 1")
        betas = self.adam_betas
        is_valid = isinstance(betas, list | tuple) and len(betas) == 2 and all(map(_is_decay, betas))
        self._require("adam_betas", is_valid, "a pair of numbers from 0 to below 1")
        object.__setattr__(self, "adam_betas", tuple(betas))
        shape = self.logit_normal
        is_valid = isinstance(shape, list | tuple) and len(shape) == 2 and all(map(_is_finite, shape))
        self._require("logit_normal", is_valid and shape[1] > 0, "a pair of numbers, the second above 0,")
        object.__setattr__(self, "logit_normal", tuple(shape))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            is_choice = any(value == choice and type(value) is type(choice) for choice in choices)
            self._require(name, is_choice, f"one of {', '.join(map(str, choices))}")
        is_whole = self.compile == "full" and self.parallel == "fsdp"
        self._require("compile", not is_whole, "with parallel=fsdp, none or block")
        tracks = self.ema_tracks
        is_valid = isinstance(tracks, list | tuple) and all(map(_is_track, tracks))
        self._require("ema_tracks", is_valid, "a list of different numbers above 0, up to 0.2886,")
        object.__setattr__(self, "ema_tracks", tuple(tracks))
        self._require("ema_tracks", len(set(tracks)) == len(tracks), "a list of different numbers")
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
        return from_fields(cls, fields, "a training run")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON's values, which compare equal after a way through a file."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    def rank_batch_size(self, world_size: int) -> int:
        """Images of a step that each of so many processes computes; ValueError where they do not divide."""
        rows, rest = divmod(self.batch_size, world_size)
        if rest or not rows:
            raise ValueError(
                f"batch_size: {self.batch_size} given; a multiple of the {world_size} processes is accepted"
            )
        if self.micro_batch_size and rows % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} given; a divisor of {rows}, the images of a step "
                f"that each of {world_size} processes computes, is accepted"
            )
        return rows

    @property
    def autoencoder_source(self) -> str:
        """The folder or hub id that `autoencoder` stands for."""
        if self.autoencoder == SHIPPED_AUTOENCODER:
            return str(default_model_dir(256) / "vae")
        return self.autoencoder

    def network_config(self, *, num_classes: int, downsampling: int, in_channels: int) -> Architecture:
        """The network for this data and autoencoder.

        ValueError where `network` says otherwise of what follows from them. `num_classes: 0` may stand there:
        it leaves the labels unused.
        """
        accepted: dict[str, tuple[int, ...]] = {
            "num_classes": (num_classes, 0),
            "in_channels": (in_channels,),
            "sample_size": (self.resolution // downsampling,),
        }
        follows = {name: values[0] for name, values in accepted.items()}
        for name, values in accepted.items():
            given = self.network.get(name, follows[name])
            if given not in values:
                raise ValueError(
                    f"network.{name}: {given!r} given; {' or '.join(map(str, values))}, which follows from "
                    "data, autoencoder and resolution, is accepted"
                )
        return architecture_from_fields(follows | self.network)

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


def _is_track(value: Any) -> bool:
    return is_number(value) and 0 < value <= 12**-0.5


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_decay(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1
