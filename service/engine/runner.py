"""Denoising steps of one lane on its device. Holds the slots' tensors and no queue.

    gather the active slots -> StepBatch -> the pipeline's `denoise_step`, as in-process -> scatter

S slots, n active images, (C, H, W) the latents of one. A step leaves the slots as they were if it raises,
so it can be tried again with fewer images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.diffusion.noise import gaussian_noise
from model.diffusion.samplers import SamplerTable, sampler_table
from model.diffusion.step import StepBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from service.engine.pipeline import ServedPipeline
    from service.engine.request import ImageJob

__all__ = ["FinishedLatents", "Runner"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedLatents:
    """Denoised images on their way to the decoder."""

    jobs: tuple[ImageJob, ...]
    latents: Tensor
    """(n, C, H, W) fp32."""
    ready: torch.cuda.Event | None
    """What another stream has to wait for before it reads `latents`; None on a CPU."""


class Runner:
    """The slots of one model; used by the engine's thread alone."""

    def __init__(self, pipeline: ServedPipeline, *, num_slots: int) -> None:
        self._pipeline = pipeline
        self._device = pipeline.device
        shape = (num_slots, *pipeline.latent_shape)
        with torch.inference_mode():
            self._latents = torch.zeros(shape, device=self._device)  # (S, C, H, W)
            self._history = torch.zeros(shape, device=self._device)  # (S, C, H, W)
        self._all_sizes = self._device.type == "cuda"

    @torch.inference_mode()
    def step(self, jobs: Sequence[ImageJob]) -> None:
        """Move the images one step, those at their first one from their initial noise."""
        slots = self._int64([job.slot or 0 for job in jobs])  # (n,)
        latents = self._latents[slots]  # (n, C, H, W)
        fresh = [index for index, job in enumerate(jobs) if job.step_index == 0]
        if fresh:
            latents[self._int64(fresh)] = self._noise([jobs[index] for index in fresh], [0] * len(fresh))
        batch = self._batch(jobs, latents, self._history[slots])
        latents, history = self._pipeline.denoise_step(batch)
        self._latents[slots] = latents
        self._history[slots] = history
        self._wait_for_step()

    @torch.inference_mode()
    def take(self, jobs: Sequence[ImageJob]) -> FinishedLatents:
        """The latents of finished images, copied, so that their slots are free at once."""
        latents = self._latents[self._int64([job.slot or 0 for job in jobs])]  # (n, C, H, W)
        return FinishedLatents(jobs=tuple(jobs), latents=latents, ready=self._record_event())

    @torch.inference_mode()
    def warm_up(self, *, decode_batch: int) -> None:
        """Run images through network and decoder, so that no request pays for what is lazy.

        On CUDA also at the other ends of what a step can be (`_warm_up_steps`) and at the decoder's batch
        size. Raises whatever that raises, and ArithmeticError for weights that give no finite numbers.
        """
        pipeline = self._pipeline
        pipeline.prepare_steps(max_images=len(self._latents))
        steps = _warm_up_steps(
            len(self._latents), conditional=pipeline.num_classes > 0, all_ends=self._all_sizes
        )
        for num_images, guided in steps:
            latents = self._warm_up_step(num_images, guided=guided)
            if not torch.isfinite(latents).all():
                raise ArithmeticError(f"{pipeline.name} computes values that are not finite")
        for num_images in (1, decode_batch) if self._all_sizes else (1,):
            pipeline.decode(torch.zeros((num_images, *pipeline.latent_shape), device=self._device))

    def _warm_up_step(self, num_images: int, *, guided: bool) -> Tensor:
        """The latents `(num_images, C, H, W)` after a step of that many images of class 0."""
        zeros = self._int64([0] * num_images)
        noise = gaussian_noise(zeros, zeros, zeros, self._pipeline.latent_shape)  # (n, C, H, W)
        table = sampler_table("ddpm", 1, self._pipeline.schedule)
        batch = StepBatch(
            latents=noise,
            history=torch.zeros_like(noise),
            timesteps=table.timesteps.to(self._device).expand(num_images),
            coefficients=table.coefficients.to(self._device).expand(num_images, -1),
            class_labels=zeros,
            guidance_scale=torch.full((num_images,), 2.0 if guided else 1.0, device=self._device),
            guided=self._int64(range(num_images) if guided else []),
            noise=noise,
        )
        latents, _ = self._pipeline.denoise_step(batch)
        return latents

    def _batch(self, jobs: Sequence[ImageJob], latents: Tensor, history: Tensor) -> StepBatch:
        tables = [self._table(job) for job in jobs]
        coefficients = torch.stack(
            [table.coefficients[job.step_index] for table, job in zip(tables, jobs, strict=True)]
        )
        scales = torch.tensor([job.request.guidance_scale for job in jobs], dtype=torch.float32)
        guided = [index for index, job in enumerate(jobs) if job.request.guidance_scale != 1.0]
        return StepBatch(
            latents=latents,
            history=history,
            timesteps=torch.stack(
                [table.timesteps[job.step_index] for table, job in zip(tables, jobs, strict=True)]
            ).to(self._device),
            coefficients=coefficients.to(self._device),  # (n, 8)
            class_labels=self._int64([job.request.class_label for job in jobs]),
            guidance_scale=scales.to(self._device),
            guided=self._int64(guided),
            noise=self._step_noise(jobs, tables),
        )

    def _step_noise(self, jobs: Sequence[ImageJob], tables: Sequence[SamplerTable]) -> Tensor | None:
        """(n, C, H, W): draw i + 1 for a stochastic image at step i, zeros for the others."""
        noisy = [index for index, table in enumerate(tables) if table.stochastic]
        if not noisy:
            return None
        drawn = self._noise([jobs[index] for index in noisy], [jobs[index].step_index + 1 for index in noisy])
        noise = torch.zeros((len(jobs), *self._pipeline.latent_shape), device=self._device)
        noise[self._int64(noisy)] = drawn
        return noise

    def _noise(self, jobs: Sequence[ImageJob], draws: Sequence[int]) -> Tensor:
        return gaussian_noise(
            self._int64([job.request.seed for job in jobs]),
            self._int64([job.image_index for job in jobs]),
            self._int64(draws),
            self._pipeline.latent_shape,
        )  # (n, C, H, W)

    def _table(self, job: ImageJob) -> SamplerTable:
        request = job.request
        return sampler_table(request.sampler, request.num_inference_steps, self._pipeline.schedule)

    def _int64(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait_for_step(self) -> None:
        """Wait until the device is done: the engine charges a model with the time that its steps take.

        It costs no overlap. Handing over a step's numbers waits for the step before it as it is, so without
        this that time would be charged to whichever model steps next.
        """
        done = self._record_event()
        if done is not None:
            done.synchronize()


def _warm_up_steps(max_rows: int, *, conditional: bool, all_ends: bool) -> list[tuple[int, bool]]:
    """The steps (images, guided) that a model is warmed up with.

    Kernels are chosen by the number of rows, with thresholds that differ from layer to layer, and compiled
    at their first use: what is chosen anywhere is chosen at the fewest rows or at the most.
    """
    guided = [(1, True), (max_rows // 2, True)] if conditional and max_rows > 1 else []
    steps = [*guided, (1, False), (max_rows, False)]
    return list(dict.fromkeys(steps)) if all_ends else steps[:1]
