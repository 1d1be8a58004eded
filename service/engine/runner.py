"""Denoising steps of one lane on its device. Holds the slots' tensors and no queue.

    gather the active slots -> StepBatch -> the pipeline's `denoise_step`, as in-process -> scatter

S slots, n active images, (C, H, W) the latents of one. A step leaves the slots as they were if it raises,
so it can be tried again with fewer images. On CUDA everything is launched, nothing waited for: `launched`
says when the device has done it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.diffusion.noise import gaussian_noise
from model.diffusion.samplers import SamplerTable, sampler_table
from model.diffusion.step import StepBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from service.engine.pipeline import ServedPipeline
    from service.engine.request import ImageJob

__all__ = ["FinishedLatents", "Runner"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedLatents:
    """Denoised images on their way to the decoder."""

    jobs: tuple[ImageJob, ...]
    pipeline: ServedPipeline
    """What decodes them; with the last image of a model that is served no longer, it goes."""
    latents: Tensor
    """(n, C, H, W) fp32."""
    ready: torch.cuda.Event | None
    """What another stream has to wait for before it reads `latents`; None on a CPU."""


@dataclass(frozen=True, eq=False)
class _StepNumbers:
    """What the host knows of a step's n images, on the device: `(n,)` int64 unless said otherwise."""

    coefficients: Tensor
    """(n, 8) fp32."""
    guidance_scale: Tensor
    """(n,) fp32."""
    slots: Tensor
    timesteps: Tensor
    class_labels: Tensor
    seeds: Tensor
    image_indices: Tensor
    draws: Tensor
    """Of the step's noise; 0 is the initial noise."""
    fresh: Tensor
    """Images at their first step; like `noisy` and `guided`, numbers of images, as many as there are."""
    noisy: Tensor
    """Images whose sampler draws noise at each step."""
    guided: Tensor


class Runner:
    """The slots of one model; used by the engine's thread alone."""

    def __init__(self, pipeline: ServedPipeline, *, num_slots: int) -> None:
        self.pipeline = pipeline
        """The model."""
        self._device = pipeline.device
        shape = (num_slots, *pipeline.latent_shape)
        with torch.inference_mode():
            self._latents = torch.zeros(shape, device=self._device)  # (S, C, H, W)
            self._history = torch.zeros(shape, device=self._device)  # (S, C, H, W)
        self._all_sizes = self._device.type == "cuda"

    @torch.inference_mode()
    def step(self, jobs: Sequence[ImageJob]) -> None:
        """Move the images one step, those at their first one from their initial noise."""
        numbers = self._numbers(jobs)
        slots = numbers.slots
        latents = self._latents[slots]  # (n, C, H, W)
        if len(numbers.fresh):
            latents[numbers.fresh] = self._noise(numbers, numbers.fresh, torch.zeros_like(numbers.fresh))
        batch = StepBatch(
            latents=latents,
            history=self._history[slots],
            timesteps=numbers.timesteps,
            coefficients=numbers.coefficients,
            class_labels=numbers.class_labels,
            guidance_scale=numbers.guidance_scale,
            guided=numbers.guided,
            noise=self._step_noise(numbers, latents),
        )
        latents, history = self.pipeline.denoise_step(batch)
        self._latents[slots] = latents
        self._history[slots] = history

    @torch.inference_mode()
    def take(self, jobs: Sequence[ImageJob]) -> FinishedLatents:
        """The latents of finished images, copied, so that their slots are free at once."""
        (slots,) = self._int64([job.slot or 0 for job in jobs])
        latents = self._latents[slots]  # (n, C, H, W)
        return FinishedLatents(
            jobs=tuple(jobs), pipeline=self.pipeline, latents=latents, ready=self.launched()
        )

    @torch.inference_mode()
    def preview(self, jobs: Sequence[ImageJob]) -> NDArray[np.uint8]:
        """Rough pictures `(n, h, w, 3)` of what the images' last step took them to become, x0; on CUDA filled
        in by the time of `launched`.
        """
        (slots,) = self._int64([job.slot or 0 for job in jobs])
        return self.pipeline.preview(self._history[slots]).numpy()

    def free_memory(self) -> None:
        """Give back what torch keeps of freed memory. Captured graphs keep theirs; replays take no more."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def warm_up(self, *, decode_batch: int) -> None:
        """Run images through network and decoder, so that no request pays for what is lazy.

        On CUDA also at the other ends of what a step can be (`_warm_up_steps`) and at each size that the
        decoder runs. Raises whatever that raises, and ArithmeticError for weights that give no finite
        numbers.
        """
        for _ in self.warm_up_in_parts(decode_batch=decode_batch):
            pass

    @torch.inference_mode()
    def warm_up_in_parts(self, *, decode_batch: int) -> Iterator[None]:
        """As `warm_up`, a step or a captured size at a time, for a device that has other work meanwhile."""
        pipeline = self.pipeline
        yield from pipeline.prepare_steps(max_images=len(self._latents))
        steps = _warm_up_steps(
            len(self._latents), conditional=pipeline.num_classes > 0, all_ends=self._all_sizes
        )
        for num_images, guided in steps:
            latents = self._warm_up_step(num_images, guided=guided)
            if not torch.isfinite(latents).all():
                raise ArithmeticError(f"{pipeline.name} computes values that are not finite")
            yield
        yield from pipeline.prepare_decode(max_images=decode_batch)

    def _warm_up_step(self, num_images: int, *, guided: bool) -> Tensor:
        """The latents `(num_images, C, H, W)` after a step of that many images of class 0."""
        zeros, guided_images = self._int64([0] * num_images, range(num_images) if guided else [])
        noise = gaussian_noise(zeros, zeros, zeros, self.pipeline.latent_shape)  # (n, C, H, W)
        table = sampler_table("ddpm", 1, self.pipeline.schedule)
        batch = StepBatch(
            latents=noise,
            history=torch.zeros_like(noise),
            timesteps=table.timesteps.to(self._device).expand(num_images),
            coefficients=table.coefficients.to(self._device).expand(num_images, -1),
            class_labels=zeros,
            guidance_scale=torch.full((num_images,), 2.0 if guided else 1.0, device=self._device),
            guided=guided_images,
            noise=noise,
        )
        latents, _ = self.pipeline.denoise_step(batch)
        return latents

    def _numbers(self, jobs: Sequence[ImageJob]) -> _StepNumbers:
        tables = [self._table(job) for job in jobs]
        steps = [job.step_index for job in jobs]
        requests = [job.request for job in jobs]
        integers = self._int64(
            [job.slot or 0 for job in jobs],
            [int(table.timesteps[step]) for table, step in zip(tables, steps, strict=True)],
            [request.class_label for request in requests],
            [request.seed for request in requests],
            [job.image_index for job in jobs],
            [step + 1 for step in steps],
            [index for index, step in enumerate(steps) if step == 0],
            [index for index, table in enumerate(tables) if table.stochastic],
            [index for index, job in enumerate(jobs) if job.guided],
        )
        coefficients = [table.coefficients[step] for table, step in zip(tables, steps, strict=True)]
        scales = torch.tensor([request.guidance_scale for request in requests], dtype=torch.float32)
        floats = self._handed_over(torch.cat([torch.stack(coefficients), scales[:, None]], dim=1))  # (n, 9)
        return _StepNumbers(floats[:, :-1], floats[:, -1], *integers)

    def _step_noise(self, numbers: _StepNumbers, latents: Tensor) -> Tensor | None:
        """Like `latents`: draw i + 1 for a stochastic image at step i, zeros for the others."""
        noisy = numbers.noisy
        if not len(noisy):
            return None
        return torch.zeros_like(latents).index_copy_(
            0, noisy, self._noise(numbers, noisy, numbers.draws[noisy])
        )

    def _noise(self, numbers: _StepNumbers, images: Tensor, draws: Tensor) -> Tensor:
        """(len(images), C, H, W), of those of the step."""
        seeds, indices = numbers.seeds[images], numbers.image_indices[images]
        return gaussian_noise(seeds, indices, draws, self.pipeline.latent_shape)

    def _table(self, job: ImageJob) -> SamplerTable:
        request = job.request
        return sampler_table(request.sampler, request.num_inference_steps, self.pipeline.schedule)

    def _int64(self, *lists: Sequence[int]) -> tuple[Tensor, ...]:
        """Each list as a tensor; all of them in one transfer."""
        values = torch.tensor([value for values in lists for value in values], dtype=torch.int64)
        return self._handed_over(values).split([len(values) for values in lists])

    def _handed_over(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device; the host does not wait for a GPU to have read it."""
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def launched(self) -> torch.cuda.Event | None:
        """When the device has done all that it was given so far; None on a CPU, which has."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def _warm_up_steps(max_rows: int, *, conditional: bool, all_ends: bool) -> list[tuple[int, bool]]:
    """The steps (images, guided) that a model is warmed up with.

    Kernels are chosen by the number of rows, with thresholds that differ from layer to layer, and compiled
    at their first use: what is chosen anywhere is chosen at the fewest rows or at the most.
    """
    guided = [(1, True), (max_rows // 2, True)] if conditional and max_rows > 1 else []
    steps = [*guided, (1, False), (max_rows, False)]
    return list(dict.fromkeys(steps)) if all_ends else steps[:1]
