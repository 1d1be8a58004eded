"""What is in a model's folder: reading it, checking it, writing it.

The folder has diffusers' pipeline layout, so `DiTPipeline.from_pretrained` reads it too once the network's
class is imported:

    model_index.json   DiTPipeline's index with id2label, and our own entries under "lamamba"
    transformer/       LaMambaDiff, or the DiT that it is compared with
    guidance_transformer/  the network of autoguidance, smaller or trained for less time; may be missing
    vae/               AutoencoderKL
    scheduler/         the configuration of a DPMSolverMultistepScheduler, for diffusers alone
    preview.json       the map of `model.preview`, for pictures of unfinished images; may be missing

What cannot be read or does not fit is a ValueError of one line that names the folder and the cause.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from model.architecture import saved_kind
from model.autoencoder import Autoencoder
from model.diffusion.samplers import diffusers_scheduler_config
from model.diffusion.schedule import NoiseSchedule
from model.limits import GUIDANCE_SCALE_RANGE
from model.messages import one_line
from model.network.kinds import NETWORK_CLASSES, DiffusionNetwork, new_network
from model.network.lamamba import LaMambaDiff
from model.whole_file import write_json

__all__ = [
    "DEFAULT_GUIDANCE_SCALE",
    "GPU_DTYPES",
    "ModelIndex",
    "add_guidance_network",
    "load_autoencoder",
    "load_guidance_network",
    "load_network",
    "local_folder",
    "moved_network",
    "own_weights",
    "read_model_index",
    "save_model_folder",
    "staged_entries",
    "weights_hash",
    "write_model_index",
    "write_scheduler",
]

logger = logging.getLogger(__name__)

DEFAULT_GUIDANCE_SCALE = 2.5
GPU_DTYPES = ("bfloat16", "float16", "float32")
"""The first where a model says nothing: its range is fp32's. float16 is eight times as exact and ends at
65504.
"""
_LAMAMBA_KEY = "lamamba"
_NETWORK_DIR = "transformer"
_GUIDANCE_NETWORK_DIR = "guidance_transformer"
_HASH_DIGITS = 12
_REQUIRED_ENTRIES = ("_class_name", "transformer", "vae")


@dataclass(frozen=True, kw_only=True)
class ModelIndex:
    """What model_index.json says that diffusers' parts do not say themselves."""

    folder: Path
    name: str
    guidance_scale: float
    guidance_channels: int | None
    id2label: Mapping[str, str] | None
    gpu_dtype: str
    """Of `GPU_DTYPES`: what a GPU runs the model in where nobody says otherwise."""
    has_guidance_network: bool
    """Whether guidance steps away from the folder's second network, rather than from the first's null class.
    """

    def labels(self, num_classes: int) -> tuple[str, ...]:
        """The names of the network's classes, "class 0" and so on where the index has none."""
        names = self.id2label or {str(i): f"class {i}" for i in range(num_classes)}
        if set(names) != {str(i) for i in range(num_classes)}:
            raise ValueError(
                f"{self.folder}: model_index.json labels {len(names)} classes; the network has {num_classes}"
            )
        return tuple(names[str(i)] for i in range(num_classes))

    def check_guidance_channels(self, in_channels: int) -> None:
        """Refuse to guide more channels than the network's latents have."""
        if self.guidance_channels is not None and self.guidance_channels > in_channels:
            raise _wrong_entry(
                self.folder,
                "lamamba.guidance_channels",
                self.guidance_channels,
                f"null or 1 to {in_channels}",
            )


def local_folder(folder: Path | str) -> Path:
    """The folder itself, or the local copy of a hub id's."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise ValueError(f"{folder}: no such model folder")
    try:
        with _quiet_libraries():
            return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub's client raises its own errors and those of what it stands on
        raise ValueError(
            f"{folder}: neither a folder nor a model that the hub gives ({one_line(error)})"
        ) from error


def read_model_index(path: Path) -> ModelIndex:
    """Read and check model_index.json of the folder `path`."""
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a model folder, model_index.json cannot be read ({one_line(error)})"
        ) from error
    if not isinstance(index, dict):
        raise ValueError(f"{path}: not a model folder, model_index.json is not an object")
    missing = [entry for entry in _REQUIRED_ENTRIES if entry not in index]
    if missing:
        raise ValueError(f"{path}: not a model folder, model_index.json has no {', '.join(missing)}")
    own = index.get(_LAMAMBA_KEY, {})
    if not isinstance(own, dict):
        raise _wrong_entry(path, _LAMAMBA_KEY, own, "an object")
    name = own.get("name", path.resolve().name)
    if not isinstance(name, str) or not name.strip():
        raise _wrong_entry(path, "lamamba.name", name, "a name")
    scale = own.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
    low, high = GUIDANCE_SCALE_RANGE
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not low <= scale <= high:
        raise _wrong_entry(path, "lamamba.guidance_scale", scale, f"{low:g} to {high:g}")
    channels = own.get("guidance_channels")
    if channels is not None and (type(channels) is not int or channels < 1):
        raise _wrong_entry(path, "lamamba.guidance_channels", channels, "null or a number of latent channels")
    gpu_dtype = own.get("gpu_dtype", GPU_DTYPES[0])
    if gpu_dtype not in GPU_DTYPES:
        raise _wrong_entry(path, "lamamba.gpu_dtype", gpu_dtype, f"one of {', '.join(GPU_DTYPES)}")
    guidance_network = own.get("guidance_network", False)
    if not isinstance(guidance_network, bool):
        raise _wrong_entry(path, "lamamba.guidance_network", guidance_network, "true or false")
    return ModelIndex(
        folder=path,
        name=name,
        guidance_scale=float(scale),
        guidance_channels=channels,
        id2label=_checked_id2label(path, index.get("id2label")),
        gpu_dtype=gpu_dtype,
        has_guidance_network=guidance_network,
    )


def load_network(folder: Path | str) -> DiffusionNetwork:
    """The network of a model folder (or of its transformer/ folder) in fp32 on the CPU.

    Raises ValueError, one line, for weights that are missing, damaged or not those of their configuration.
    """
    path = Path(folder)
    path = path / _NETWORK_DIR if (path / _NETWORK_DIR).is_dir() else path
    try:
        _check_weight_files(path)
        with _quiet_libraries():
            loaded: Any = _network_class(path).from_pretrained(
                path,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: the network cannot be loaded: {one_line(error)}") from error
    network: DiffusionNetwork
    network, info = loaded
    wrong = sorted(str(key) for keys in info.values() for key in keys)
    if wrong:
        raise ValueError(
            f"{path}: the network cannot be loaded: {len(wrong)} weights do not fit its configuration, "
            f"{', '.join(wrong[:3])} among them"
        )
    return network


def load_guidance_network(folder: Path, network: DiffusionNetwork) -> DiffusionNetwork:
    """The network of autoguidance of a model folder whose first network is `network`, as `load_network` does.

    Raises ValueError also for one whose latents, classes or output are others.
    """
    guidance_network = load_network(folder / _GUIDANCE_NETWORK_DIR)
    _check_guidance_network(folder, guidance_network, network)
    return guidance_network


def add_guidance_network(folder: Path, source: Path | str) -> None:
    """Make the network of the model folder `source` that of autoguidance in the model folder `folder`.

    `source` may also be, or hold, a network alone, whose classes and latents nobody can tell then.

    Raises ValueError, before anything is written, where it does not fit.
    """
    read_model_index(folder)
    source = local_folder(source)
    network = load_network(folder)
    _check_guidance_network(source, load_network(source), network)
    if (source / "model_index.json").is_file():
        _check_guidance_model(source, folder, network.architecture.num_classes)
    network_dir = source / _NETWORK_DIR if (source / _NETWORK_DIR).is_dir() else source
    copy, target = folder / f".{_GUIDANCE_NETWORK_DIR}.tmp", folder / _GUIDANCE_NETWORK_DIR
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(network_dir, copy)
    shutil.rmtree(target, ignore_errors=True)  # or files of an earlier network would stay among its own
    copy.rename(target)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[_LAMAMBA_KEY] = index.get(_LAMAMBA_KEY, {}) | {"guidance_network": True}
    write_json(folder / "model_index.json", index)


def _check_guidance_network(
    folder: Path, guidance_network: DiffusionNetwork, network: DiffusionNetwork
) -> None:
    if not network.architecture.num_classes:
        raise ValueError(f"{folder}: a guidance network given; only models with classes accept one")
    for field in ("in_channels", "sample_size", "num_classes"):
        value, accepted = (getattr(n.architecture, field) for n in (guidance_network, network))
        if value != accepted:
            raise ValueError(
                f"{folder}: the guidance network's {field} is {value}; the model's, {accepted}, is accepted"
            )


def _check_guidance_model(source: Path, folder: Path, num_classes: int) -> None:
    """Refuse a guidance network of other classes or another autoencoder, as far as both folders say so."""
    own, others = read_model_index(folder), read_model_index(source)
    if own.id2label is not None and others.id2label is not None:
        pairs = zip(own.labels(num_classes), others.labels(num_classes), strict=True)
        for class_id, (accepted, label) in enumerate(pairs):
            if label != accepted:
                raise ValueError(
                    f"{source}: the guidance network's class {class_id} is {label!r}; the model's, "
                    f"{accepted!r}, is accepted"
                )
    if not all((path / "vae").is_dir() for path in (folder, source)):
        return
    given, accepted = (
        load_autoencoder(path, device=torch.device("cpu"), dtype=torch.float32).weights_hash[:_HASH_DIGITS]
        for path in (source, folder)
    )
    if given != accepted:
        raise ValueError(
            f"{source}: the guidance network's autoencoder has the hash {given}; the model's, {accepted}, "
            "is accepted"
        )


def load_autoencoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of a model folder."""
    path = folder / "vae"
    try:
        _check_weight_files(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the autoencoder cannot be loaded: {one_line(error)}") from error
    with _quiet_libraries():
        return Autoencoder.load(path, device=device, dtype=dtype)


def moved_network(network: DiffusionNetwork, **where: Any) -> DiffusionNetwork:
    """`network.to(**where)` by torch's own method.

    diffusers' wrapper warns at each cast of modules that the network does not have.
    """
    nn.Module.to(network, **where)
    return network


def own_weights(module: nn.Module) -> None:
    """Copy weights out of the file that they may be mapped from: whoever writes over it would change them."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def weights_hash(folder: Path) -> str:
    """SHA-256 of the network's weight files, with autoguidance of both networks', the first 12 hex digits."""
    digest = hashlib.sha256()
    names = [_NETWORK_DIR] + [_GUIDANCE_NETWORK_DIR] * read_model_index(folder).has_guidance_network
    for path in [path for name in names for path in sorted((folder / name).glob("*.safetensors"))]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:_HASH_DIGITS]


def save_model_folder(
    folder: Path,
    *,
    network: DiffusionNetwork,
    autoencoder: Path,
    labels: Sequence[str],
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
    gpu_dtype: str = GPU_DTYPES[0],
) -> None:
    """Write `network` (rounded to `dtype`), a copy of the autoencoder's folder and the labels as a model
    folder, by `staged_entries`.
    """
    rounded = new_network(network.architecture)
    rounded.load_state_dict(network.state_dict())
    moved_network(rounded, dtype=dtype)
    with staged_entries(folder) as staging:
        rounded.save_pretrained(staging / _NETWORK_DIR, safe_serialization=True)
        shutil.copytree(autoencoder, staging / "vae")
        write_scheduler(staging)
        write_model_index(
            staging,
            labels=labels,
            name=name,
            network_class=type(network),
            guidance_scale=guidance_scale,
            gpu_dtype=gpu_dtype,
        )


@contextmanager
def staged_entries(folder: Path) -> Iterator[Path]:
    """A folder to write entries of a model folder in: as the block ends each is moved to its place whole.
    Other entries stay, but with a new index for a guidance network: it was chosen for the weights before.

    Where the block raises, the model folder is as it was. OSError for what the disk does not take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=folder) as temporary:
        staging, replaced = Path(temporary) / "new", Path(temporary) / "replaced"
        staging.mkdir()
        replaced.mkdir()
        try:
            yield staging
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written ({one_line(error)})") from error
        for entry in sorted(staging.iterdir()):
            target = folder / entry.name
            if target.is_dir():  # over which nothing can be renamed
                target.rename(replaced / entry.name)
            entry.replace(target)
            guidance_network = folder / _GUIDANCE_NETWORK_DIR
            if entry.name == "model_index.json" and guidance_network.is_dir():
                guidance_network.rename(replaced / _GUIDANCE_NETWORK_DIR)
                logger.warning("%s: removed, it guided the weights that were here before", guidance_network)


def write_scheduler(folder: Path) -> None:
    """Write scheduler/: the process as diffusers' own scheduler takes it."""
    scheduler = folder / "scheduler"
    scheduler.mkdir(exist_ok=True)
    write_json(scheduler / "scheduler_config.json", diffusers_scheduler_config(NoiseSchedule.linear()))


def write_model_index(
    folder: Path,
    *,
    labels: Sequence[str],
    name: str,
    network_class: type[DiffusionNetwork] = LaMambaDiff,
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
    gpu_dtype: str = GPU_DTYPES[0],
) -> None:
    """Write model_index.json: diffusers' entries, the labels, and our own under "lamamba"."""
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": [network_class.__module__, network_class.__name__],
        "vae": ["diffusers", "AutoencoderKL"],
        _LAMAMBA_KEY: {"name": name, "guidance_scale": guidance_scale, "gpu_dtype": gpu_dtype},
    }
    write_json(folder / "model_index.json", index)


def _checked_id2label(path: Path, id2label: object) -> dict[str, str] | None:
    if id2label is None:
        return None
    if not isinstance(id2label, dict):
        raise _wrong_entry(path, "id2label", id2label, 'an object from "0", "1", ... to names')
    for key, label in id2label.items():
        if not isinstance(label, str):
            raise _wrong_entry(path, f"id2label.{key}", label, "a name")
    return id2label


def _wrong_entry(path: Path, field: str, value: object, accepted: str) -> ValueError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return ValueError(f"{path}: model_index.json, {field}: {shown} given; {accepted} is accepted")


def _network_class(folder: Path) -> Any:
    """The class of the network that the folder's config.json describes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("config.json is not an object")
    return NETWORK_CLASSES[saved_kind(config)]


def _check_weight_files(folder: Path) -> None:
    """Open each file, which reads its header: diffusers would not say what is wrong with a damaged one."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged: {one_line(error)}") from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries that load from logging what they raise, which is reported once, by us."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
