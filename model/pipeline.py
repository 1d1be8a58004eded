"""A loaded model as one value, and the in-process sampler.

`generate` and the service run the same step function (`diffusion.step.denoise_step`) on the same noise, so
they make the same images. What is in a model's folder is `model_folder`'s to know.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from model.autoencoder import Autoencoder
from model.captured_decoder import DECODED_SIZES, CapturedDecoder
from model.captured_steps import CapturedSteps, StepFunction
from model.cpu_rows import RowThreads
from model.cuda_memory import peak_bytes
from model.device import resolve_device
from model.diffusion.guidance import check_guidance_interval, guided_steps
from model.diffusion.noise import gaussian_noise
from model.diffusion.samplers import SamplerTable, sampler_table
from model.diffusion.schedule import NoiseSchedule
from model.diffusion.step import DenoisingNetwork, StepBatch, denoise_step
from model.fixed_rows import FixedRows
from model.model_folder import (
    load_autoencoder,
    load_guidance_network,
    load_network,
    local_folder,
    moved_network,
    own_weights,
    read_model_index,
    weights_hash,
)
from model.network.compiled_blocks import with_compiled_blocks
from model.network.kinds import DiffusionNetwork
from model.network.scan import resolve_scan_backend
from model.preview import PreviewMap, read_preview_map

__all__ = ["LaMambaPipeline"]

_NEAR_LABELS = 3


@dataclass(frozen=True, kw_only=True)
class LaMambaPipeline:
    """A loaded model: network, autoencoder, schedule, labels, and what they run on."""

    name: str
    resolution: int
    network: DiffusionNetwork
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
    step_function: StepFunction | None = None
    """`denoise_step` of the network as this device runs it fastest; None is the plain one."""
    fixed_rows: FixedRows | None = None
    """What has all network calls be of one size; None: they are as large as the steps."""
    captured_decoder: CapturedDecoder | None = None
    """The autoencoder's decoder in one launch; None launches it call by call."""
    guidance_network: DiffusionNetwork | None = None
    """What guided images step away from (autoguidance); None is `network` without a class."""
    guidance_fixed_rows: FixedRows | None = None
    """`fixed_rows` of the guidance network."""
    preview_map: PreviewMap | None = None
    """What makes pictures of unfinished images; None: the model's folder has none."""

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scan_backend: str = "auto",
        num_row_threads: int = 1,
        cuda_graphs: bool = True,
        compile: bool = False,
        fixed_rows: int | None = None,
    ) -> LaMambaPipeline:
        """Load a model folder, or a hub id of one.

        Args:
            device: CUDA when there is one, else the CPU.
            dtype: of network and autoencoder; by default fp32 on the CPU, on CUDA what the model's index
                says (`model_folder.GPU_DTYPES`).
            scan_backend: see `network.scan.resolve_scan_backend`.
            num_row_threads: CPU threads that share the rows of a step; for programs that give torch one
                thread (`torch.set_num_threads(1)`). Other devices do not use them.
            cuda_graphs: on CUDA, launch a denoising step, and the decoder, as one CUDA graph each.
            compile: on CUDA, compile the blocks at the first steps: see `network.compiled_blocks`.
            fixed_rows: have the network always compute so many rows, filled up, and decode images singly: an
                image is then the same to the bit whatever is computed with it. 1 is for a CPU, where rows
                take no less time together. On CUDA call `fixed_rows.prepare_process` too.

        Raises:
            ValueError: one line that names the folder and what does not fit.
        """
        device = resolve_device(device)
        backend = resolve_scan_backend(scan_backend, device)
        path = local_folder(folder)
        index = read_model_index(path)
        if dtype is None:
            dtype = getattr(torch, index.gpu_dtype) if device.type == "cuda" else torch.float32
        network = load_network(path)
        autoencoder = load_autoencoder(path, device=device, dtype=dtype)
        if autoencoder.latent_channels != network.architecture.in_channels:
            raise ValueError(
                f"{path}: the autoencoder has {autoencoder.latent_channels} latent channels, the network "
                f"{network.architecture.in_channels}; they must be equal"
            )
        index.check_guidance_channels(network.architecture.in_channels)
        labels = index.labels(network.architecture.num_classes)
        preview_map = read_preview_map(path, latent_channels=autoencoder.latent_channels)
        guidance_network = load_guidance_network(path, network) if index.has_guidance_network else None
        networks = [network] if guidance_network is None else [network, guidance_network]
        for part in networks:
            moved_network(part, device=device, dtype=dtype).eval().requires_grad_(False)
            part.use_scan_backend(backend)
            if device.type == "cpu":  # another device has a copy
                own_weights(part)
            elif device.type == "cuda":
                part.stack_conditioning()
        if device.type == "cpu":
            own_weights(autoencoder.module)
        graphs = cuda_graphs and device.type == "cuda"
        rows, guidance_rows = (
            None
            if fixed_rows is None or part is None
            else FixedRows(part, num_rows=fixed_rows, captured=graphs)
            for part in (network, guidance_network)
        )
        step: StepFunction | None = None
        decoder: CapturedDecoder | None = None
        if device.type == "cuda":
            step = partial(
                denoise_step,
                rows or network,
                null_label=network.null_label,
                guidance_channels=index.guidance_channels,
                guidance_network=guidance_rows or guidance_network,
            )
            for part in networks if compile else []:
                step = with_compiled_blocks(part, step)
            if graphs:
                latent_shape = _latent_shape(network)
                decoder = CapturedDecoder(
                    autoencoder.pixels,
                    latent_shape=latent_shape,
                    device=device,
                    sizes=DECODED_SIZES if rows is None else (1,),
                )
                if rows is None:
                    step = CapturedSteps(step, latent_shape=latent_shape, device=device)
        return cls(
            name=index.name,
            resolution=network.architecture.sample_size * autoencoder.downsampling,
            network=network,
            autoencoder=autoencoder,
            schedule=NoiseSchedule.linear(),
            labels=labels,
            guidance_channels=index.guidance_channels,
            default_guidance_scale=index.guidance_scale,
            weights_hash=weights_hash(path),
            device=device,
            dtype=dtype,
            row_threads=RowThreads(num_row_threads) if device.type == "cpu" and num_row_threads > 1 else None,
            step_function=step,
            fixed_rows=rows,
            captured_decoder=decoder,
            guidance_network=guidance_network,
            guidance_fixed_rows=guidance_rows,
            preview_map=None if preview_map is None else preview_map.to(device),
        )

    def denoise_step(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Next latents and history of the images of `batch`, as this device computes them fastest."""
        if self.step_function is not None:
            return self.step_function(batch)
        network: DenoisingNetwork = self.fixed_rows or self.network
        guidance_network: DenoisingNetwork | None = self.guidance_fixed_rows or self.guidance_network
        if self.row_threads is not None:
            network = self.row_threads.share(network)
            guidance_network = guidance_network and self.row_threads.share(guidance_network)
        return denoise_step(
            network,
            batch,
            null_label=self.null_label,
            guidance_channels=self.guidance_channels,
            guidance_network=guidance_network,
        )

    @property
    def networks(self) -> list[DiffusionNetwork]:
        """The network, and that of autoguidance if there is one."""
        return [self.network] if self.guidance_network is None else [self.network, self.guidance_network]

    @torch.inference_mode()
    def step_bytes(self, num_images: int) -> int:
        """Device memory that a step of so many images takes at once, guided where there are classes; on CUDA.

        Raises OutOfMemoryError.
        """
        captured = self.step_function
        step = captured.uncaptured if isinstance(captured, CapturedSteps) else self.denoise_step
        num_guided = num_images if self.num_classes else 0
        batch = StepBatch.blank(num_images, self.latent_shape, num_guided=num_guided, device=self.device)
        return peak_bytes(partial(step, batch), self.device)

    @torch.inference_mode()
    def decode_bytes(self, num_images: int) -> int:
        """Device memory that decoding so many images takes at once; on CUDA. Raises OutOfMemoryError."""
        latents = torch.zeros(num_images, *self.latent_shape, device=self.device)
        return peak_bytes(partial(self.autoencoder.pixels, latents), self.device)

    def num_rows(self, num_images: int, num_guided: int) -> int:
        """Rows that the networks compute in a step of so many images, those that fill them up included."""
        if isinstance(self.step_function, CapturedSteps):
            return self.step_function.num_rows(num_images, num_guided)
        if self.fixed_rows is None:
            return num_images + num_guided
        if self.guidance_fixed_rows is None:
            return self.fixed_rows.num_computed(num_images + num_guided)
        return self.fixed_rows.num_computed(num_images) + self.guidance_fixed_rows.num_computed(num_guided)

    def prepare_steps(self, *, max_images: int) -> Iterator[None]:
        """Make ready what `denoise_step` makes at the first step of each size, up to so many images; a size
        at a time.
        """
        if isinstance(self.step_function, CapturedSteps):
            yield from self.step_function.capture_all(max_images=max_images, conditional=self.num_classes > 0)

    @torch.inference_mode()
    def prepare_decode(self, *, max_images: int) -> Iterator[None]:
        """Make ready what `decode` makes at the first batch of each size, up to so many images; a size at a
        time.
        """
        if self.captured_decoder is not None:
            sizes = self.captured_decoder.sizes(max_images=max_images)
        else:
            sizes = [1] if self._decodes_singly else list(range(1, max_images + 1))
        for num_images in sizes:
            self.decode(torch.zeros(num_images, *self.latent_shape, device=self.device))
            yield

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
        return _latent_shape(self.network)

    @property
    def scan_backend(self) -> str:
        return self.network.scan_backend

    @property
    def has_previews(self) -> bool:
        """Whether the model's folder has a preview map."""
        return self.preview_map is not None

    def class_index(self, class_id: int | str) -> int:
        """The label of a class given by number or by name (case and surrounding space do not matter).

        Raises ValueError naming the accepted range, or the nearest names.
        """
        if isinstance(class_id, str) and not _is_number(class_id):
            named = self.label_index(class_id)
            if named is not None:
                return named
            names = [label.casefold() for label in self.labels]
            wanted = class_id.strip().casefold()
            near = difflib.get_close_matches(wanted, names, n=_NEAR_LABELS, cutoff=0.0)
            hint = ", ".join(repr(self.labels[names.index(name)]) for name in near)
            raise ValueError(f"class_id: {class_id!r} given; the nearest of {len(names)} classes are {hint}")
        index = int(class_id)
        if not 0 <= index < self.num_classes:
            raise ValueError(f"class_id: {index} given; this model accepts 0 to {self.num_classes - 1}")
        return index

    def label_index(self, label: str) -> int | None:
        """The class that a text names, as `class_index` reads it; None where there is none, without a
        search.
        """
        if _is_number(label):
            return index if (index := int(label)) < self.num_classes else None
        return self._indices.get(label.strip().casefold())

    @cached_property
    def _indices(self) -> dict[str, int]:
        """Of the labels; of two alike, the first one's."""
        return {label.casefold(): index for index, label in reversed(list(enumerate(self.labels)))}

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(n, C, H, W)` to pixels `(n, height, width, 3)` uint8 on the CPU."""
        if self.captured_decoder is not None and len(latents):
            return self.captured_decoder(latents)
        parts = latents.split(1) if self._decodes_singly else (latents,)
        return torch.cat([self.autoencoder.pixels(part) for part in parts]).cpu()

    @property
    def _decodes_singly(self) -> bool:
        """Where nothing is captured. On a CPU a batch takes the time of its images one by one, and a multiple
        of their memory.
        """
        return self.device.type == "cpu" or self.fixed_rows is not None

    @torch.inference_mode()
    def preview(self, latents: Tensor) -> Tensor:
        """Latents `(n, C, h, w)` fp32 to rough pictures `(n, h, w, 3)` uint8 on the CPU; from a GPU they are
        there when it has done all that it was given, for which this does not wait.

        Raises ValueError for a model without a preview map.
        """
        if self.preview_map is None:
            raise ValueError(f"{self.name}: no preview map; `lamamba fit-previews` makes one")
        return self.preview_map(latents).to("cpu", non_blocking=True)

    @torch.inference_mode()
    def generate(
        self,
        class_labels: Sequence[int],
        *,
        seeds: Sequence[int],
        image_indices: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
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
            guidance_interval: the least and the greatest timestep with guidance, of those of training: 0 is
                the cleanest, `schedule.num_timesteps - 1` pure noise. A step outside costs half. None is all.
            progress: called with the number of denoising steps (images x steps) just finished.

        Raises ValueError, before any work, for labels and timesteps that the model does not have.
        """
        latents = self.sample_latents(
            class_labels,
            seeds=seeds,
            image_indices=image_indices,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            sampler=sampler,
            eta=eta,
            batch_size=batch_size,
            progress=progress,
        )
        return torch.cat([self.decode(part) for part in latents.split(batch_size)])

    @torch.inference_mode()
    def sample_latents(
        self,
        class_labels: Sequence[int],
        *,
        seeds: Sequence[int],
        image_indices: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        num_inference_steps: int = 20,
        sampler: str = "dpm++",
        eta: float = 0.0,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents `(n, C, h, w)` fp32 of the images that `generate` makes of the same arguments."""
        labels = self._checked_labels(class_labels)
        indices = list(image_indices) if image_indices is not None else [0] * len(labels)
        for field, given in (("seeds", seeds), ("image_indices", indices)):
            if len(given) != len(labels):
                raise ValueError(f"{field}: {len(given)} given; one a label, {len(labels)}, is accepted")
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale if self.num_classes else 1.0
        if guidance_interval is not None:
            check_guidance_interval(guidance_interval, self.schedule.num_timesteps)
        table = sampler_table(sampler, num_inference_steps, self.schedule, eta=eta)
        denoise = partial(
            self._denoise,
            table=table,
            guidance_scale=guidance_scale,
            guided=guided_steps(table.timesteps.tolist(), guidance_scale, guidance_interval),
            progress=progress,
        )
        parts = [slice(start, start + batch_size) for start in range(0, len(labels), batch_size)]
        return torch.cat([denoise(labels[part], list(seeds[part]), indices[part]) for part in parts])

    def _checked_labels(self, class_labels: Sequence[int]) -> list[int]:
        # On CUDA a label out of range fails inside a kernel, after which the process cannot use the device.
        if not len(class_labels):
            raise ValueError("class_labels: none given; one or more are accepted")
        for label in class_labels:
            if not (0 <= label < self.num_classes or label == self.null_label) or label != int(label):
                classes = f"0 to {self.num_classes - 1}, and " if self.num_classes else ""
                raise ValueError(
                    f"class_labels: {label} given; this model accepts {classes}{self.null_label} for no class"
                )
        return [int(label) for label in class_labels]

    def _denoise(
        self,
        labels: list[int],
        seeds: list[int],
        image_indices: list[int],
        *,
        table: SamplerTable,
        guidance_scale: float,
        guided: range,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        images = len(labels)
        seed, index, label = (
            torch.tensor(values, dtype=torch.int64, device=self.device)
            for values in (seeds, image_indices, labels)
        )
        scale = torch.full((images,), guidance_scale, device=self.device)
        everybody, nobody = (torch.arange(count, device=self.device) for count in (images, 0))
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
                guided=everybody if i in guided else nobody,
                noise=gaussian_noise(seed, index, draw, self.latent_shape) if table.stochastic else None,
            )
            latents, history = self.denoise_step(batch)
            if progress is not None:
                progress(images)
        return latents


def _is_number(class_id: str) -> bool:
    return class_id.isascii() and class_id.strip().isdecimal()


def _latent_shape(network: DiffusionNetwork) -> tuple[int, int, int]:
    side = network.architecture.sample_size
    return network.architecture.in_channels, side, side
