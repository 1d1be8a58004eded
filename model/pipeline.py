"""A model folder as one loaded value, and the in-process sampler.

The folder has diffusers' pipeline layout, so `DiTPipeline.from_pretrained` reads it too once LaMambaDiff is
imported:

    model_index.json   DiTPipeline's index with id2label, and our own entries under "lamamba"
    transformer/       LaMambaDiff
    vae/               AutoencoderKL
    scheduler/         the configuration of a DPMSolverMultistepScheduler

`generate` and the service run the same step function (`diffusion.step.denoise_step`) on the same noise, so
they make the same images.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn

from model.autoencoder import Autoencoder
from model.cpu_rows import RowThreads
from model.diffusion.noise import gaussian_noise
from model.diffusion.samplers import SamplerTable, diffusers_scheduler_config, sampler_table
from model.diffusion.schedule import NoiseSchedule
from model.diffusion.step import DenoisingNetwork, StepBatch, denoise_step
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend

DEFAULT_GUIDANCE_SCALE = 2.5
_LAMAMBA_KEY = "lamamba"
_NEAR_LABELS = 3


@dataclass(frozen=True, kw_only=True)
class LaMambaPipeline:
    """A loaded model: network, autoencoder, schedule, labels, and what they run on."""

    name: str
    resolution: int
    network: LaMambaDiff
    autoencoder: Autoencoder
    schedule: NoiseSchedule
    labels: tuple[str, ...]
    guidance_channels: int | None
    default_guidance_scale: float
    weights_hash: str
    device: torch.device
    dtype: torch.dtype
    row_threads: RowThreads | None = None
    """What shares the rows of a step; None runs them in one call."""

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scan_backend: str = "auto",
        num_row_threads: int = 1,
    ) -> LaMambaPipeline:
        """Load a model folder, or a hub id of one.

        Args:
            device: CUDA when there is one, else the CPU.
            dtype: of network and autoencoder; bf16 on CUDA, fp32 on the CPU.
            scan_backend: see `network.scan.resolve_scan_backend`.
            num_row_threads: CPU threads that share the rows of a step; for programs that give torch one
                thread (`torch.set_num_threads(1)`). Other devices do not use them.

        Raises:
            ValueError: one line that names the folder and what does not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        backend = resolve_scan_backend(scan_backend, device)
        path = _local_folder(folder)
        index = _read_index(path)
        network = load_network(path)
        autoencoder = Autoencoder.load(path / "vae", device=device, dtype=dtype)
        if autoencoder.latent_channels != network.architecture.in_channels:
            raise ValueError(
                f"{path}: the autoencoder has {autoencoder.latent_channels} latent channels, the network "
                f"{network.architecture.in_channels}; they must be equal"
            )
        labels = _labels(path, index, network.architecture.num_classes)
        network = _moved(network, device=device, dtype=dtype).eval().requires_grad_(False)
        network.use_scan_backend(backend)
        own = index.get(_LAMAMBA_KEY, {})
        return cls(
            name=str(own.get("name", path.name)),
            resolution=network.architecture.sample_size * autoencoder.downsampling,
            network=network,
            autoencoder=autoencoder,
            schedule=NoiseSchedule.linear(),
            labels=labels,
            guidance_channels=own.get("guidance_channels"),
            default_guidance_scale=float(own.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)),
            weights_hash=_file_hash(path / "transformer" / "diffusion_pytorch_model.safetensors"),
            device=device,
            dtype=dtype,
            row_threads=RowThreads(num_row_threads) if device.type == "cpu" and num_row_threads > 1 else None,
        )

    @property
    def denoiser(self) -> DenoisingNetwork:
        """The network as `denoise_step` is to call it on this device."""
        return self.network if self.row_threads is None else self.row_threads.share(self.network)

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return self.network.architecture.num_classes

    @property
    def null_label(self) -> int:
        return self.network.null_label

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        side = self.network.architecture.sample_size
        return self.network.architecture.in_channels, side, side

    @property
    def scan_backend(self) -> str:
        return self.network.scan_backend

    def class_index(self, class_id: int | str) -> int:
        """The label of a class given by number or by name (case and surrounding space do not matter).

        Raises ValueError naming the accepted range, or the nearest names.
        """
        if isinstance(class_id, str) and not class_id.strip().isdecimal():
            names = [label.casefold() for label in self.labels]
            wanted = class_id.strip().casefold()
            if wanted in names:
                return names.index(wanted)
            near = difflib.get_close_matches(wanted, names, n=_NEAR_LABELS, cutoff=0.0)
            hint = ", ".join(repr(self.labels[names.index(name)]) for name in near)
            raise ValueError(f"class_id: {class_id!r} given; the nearest of {len(names)} classes are {hint}")
        index = int(class_id)
        if not 0 <= index < self.num_classes:
            raise ValueError(f"class_id: {index} given; this model accepts 0 to {self.num_classes - 1}")
        return index

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(n, C, H, W)` to pixels `(n, height, width, 3)` uint8 on the CPU."""
        # On a CPU a batch takes the time of its images one by one, and a multiple of their memory.
        parts = latents.split(1) if self.device.type == "cpu" else (latents,)
        images = torch.cat([self.autoencoder.decode(part) for part in parts]).float()
        pixels = images.clamp(-1, 1).add(1).mul(127.5).round()
        return pixels.to(torch.uint8).movedim(1, -1).cpu()

    @torch.inference_mode()
    def generate(
        self,
        class_labels: Sequence[int],
        *,
        seeds: Sequence[int],
        image_indices: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 20,
        sampler: str = "dpm++",
        eta: float = 0.0,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Images `(n, height, width, 3)` uint8, one for each label.

        Image i is a function of (seeds[i], image_indices[i]) and of its own settings, whatever else is in the
        batch.

        Args:
            class_labels: numbers as `class_index` gives them; all `null_label` for an unconditional model.
            seeds: non-negative, below 2**63.
            image_indices: the image's place among those of its seed; zeros by default.
            guidance_scale: 1 turns guidance off; None takes the model's default.
            progress: called with the number of denoising steps (images x steps) just finished.
        """
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale if self.num_classes else 1.0
        table = sampler_table(sampler, num_inference_steps, self.schedule, eta=eta)
        indices = list(image_indices) if image_indices is not None else [0] * len(class_labels)
        pixels = []
        for start in range(0, len(class_labels), batch_size):
            part = slice(start, start + batch_size)
            latents = self._denoise(
                list(class_labels[part]), list(seeds[part]), indices[part], guidance_scale, table, progress
            )
            pixels.append(self.decode(latents))
        return torch.cat(pixels)

    def _denoise(
        self,
        labels: list[int],
        seeds: list[int],
        image_indices: list[int],
        guidance_scale: float,
        table: SamplerTable,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        images = len(labels)
        seed, index, label = (
            torch.tensor(values, dtype=torch.int64, device=self.device)
            for values in (seeds, image_indices, labels)
        )
        scale = torch.full((images,), guidance_scale, device=self.device)
        guided = torch.arange(images if guidance_scale != 1.0 else 0, device=self.device)
        coefficients, timesteps = table.coefficients.to(self.device), table.timesteps.to(self.device)
        latents = gaussian_noise(seed, index, torch.zeros_like(index), self.latent_shape)
        history = torch.zeros_like(latents)
        for i in range(len(table.timesteps)):
            draw = torch.full_like(index, i + 1)
            batch = StepBatch(
                latents=latents,
                history=history,
                timesteps=timesteps[i].expand(images),
                coefficients=coefficients[i].expand(images, -1),
                class_labels=label,
                guidance_scale=scale,
                guided=guided,
                noise=gaussian_noise(seed, index, draw, self.latent_shape) if table.stochastic else None,
            )
            latents, history = denoise_step(
                self.denoiser, batch, null_label=self.null_label, guidance_channels=self.guidance_channels
            )
            if progress is not None:
                progress(images)
        return latents


def save_model_folder(
    folder: Path,
    *,
    network: LaMambaDiff,
    autoencoder: Path,
    labels: Sequence[str],
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
) -> None:
    """Write `network` (rounded to `dtype`), a copy of the autoencoder's folder and the labels as a model
    folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rounded = LaMambaDiff(**dataclasses.asdict(network.architecture))
    rounded.load_state_dict(network.state_dict())
    _moved(rounded, dtype=dtype).save_pretrained(folder / "transformer", safe_serialization=True)
    shutil.copytree(autoencoder, folder / "vae", dirs_exist_ok=True)
    scheduler = folder / "scheduler"
    scheduler.mkdir(exist_ok=True)
    write_json(scheduler / "scheduler_config.json", diffusers_scheduler_config(NoiseSchedule.linear()))
    write_model_index(folder, labels=labels, name=name, guidance_scale=guidance_scale)


def write_model_index(
    folder: Path, *, labels: Sequence[str], name: str, guidance_scale: float = DEFAULT_GUIDANCE_SCALE
) -> None:
    """Write model_index.json: diffusers' entries, the labels, and our own under "lamamba"."""
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["model.network.lamamba", "LaMambaDiff"],
        "vae": ["diffusers", "AutoencoderKL"],
        _LAMAMBA_KEY: {"name": name, "guidance_scale": guidance_scale},
    }
    write_json(folder / "model_index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _moved(network: LaMambaDiff, **where: Any) -> LaMambaDiff:
    # torch's own: diffusers' wrapper warns at each cast of modules that the network does not have.
    nn.Module.to(network, **where)
    return network


def _local_folder(folder: Path | str) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise ValueError(f"{folder}: no such model folder")
    try:
        return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:
        raise ValueError(f"{folder}: neither a folder nor a model that the hub gives ({error})") from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a model folder, model_index.json cannot be read ({error})") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path}: not a model folder, model_index.json is not an object")
    return index


def load_network(folder: Path | str) -> LaMambaDiff:
    """The network of a model folder (or of its transformer/ folder) in fp32 on the CPU.

    Raises ValueError, one line, for weights that are missing, damaged or not those of their configuration.
    """
    path = Path(folder)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    try:
        loaded: Any = LaMambaDiff.from_pretrained(
            path,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: the network cannot be loaded: {_one_line(error)}") from error
    network, info = loaded
    wrong = sorted(str(key) for keys in info.values() for key in keys)
    if wrong:
        raise ValueError(
            f"{path}: the network cannot be loaded: {len(wrong)} weights do not fit its configuration, "
            f"{', '.join(wrong[:3])} among them"
        )
    return cast(LaMambaDiff, network)


def _labels(path: Path, index: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    id2label = index.get("id2label") or {str(i): f"class {i}" for i in range(num_classes)}
    if set(id2label) != {str(i) for i in range(num_classes)}:
        raise ValueError(
            f"{path}: model_index.json labels {len(id2label)} classes; the network has {num_classes}"
        )
    return tuple(str(id2label[str(i)]) for i in range(num_classes))


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
