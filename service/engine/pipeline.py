"""What the engine needs of a loaded model: `LaMambaPipeline` has it, and so has a test's fake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from model.diffusion.schedule import NoiseSchedule
    from model.diffusion.step import StepBatch

__all__ = ["ServedPipeline"]


class ServedPipeline(Protocol):
    """One model at one resolution, on one device."""

    @property
    def name(self) -> str: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def null_label(self) -> int: ...
    @property
    def resolution(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def default_guidance_scale(self) -> float: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def scan_backend(self) -> str: ...
    @property
    def has_previews(self) -> bool: ...

    def denoise_step(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Next latents and history, (images, C, H, W) fp32 each, of the images of `batch`."""

    def num_rows(self, num_images: int, num_guided: int) -> int:
        """Rows that the network computes in a step of so many images, padding included."""

    def step_bytes(self, num_images: int) -> int:
        """Device memory that a step of so many images takes beside what is loaded; on CUDA alone."""

    def decode_bytes(self, num_images: int) -> int:
        """Device memory that decoding so many images takes; on CUDA alone."""

    def prepare_steps(self, *, max_images: int) -> Iterator[None]:
        """Make ready whatever the first step of up to so many images would have to make, a part at a time."""

    def prepare_decode(self, *, max_images: int) -> Iterator[None]:
        """Make ready what the first batch of up to so many images would have to make, a part at a time."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, H, W) fp32 to pixels (n, height, width, 3) uint8 on the CPU."""

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, h, w) fp32 to rough pictures (n, h, w, 3) uint8 on the CPU; from a GPU they are
        there when it has done all that it was given.
        """

    def class_index(self, class_id: int | str) -> int:
        """The class of an id or a label; ValueError names the accepted ids and labels near a wrong one."""

    def label_index(self, label: str) -> int | None:
        """The class of that label or number; None where there is none, without a search for near ones."""
