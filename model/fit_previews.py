"""The preview map of a whole model, fitted to images of its own: `lamamba fit-previews`."""

from __future__ import annotations

from model.pipeline import LaMambaPipeline
from model.preview import PreviewMap, fit_preview_map

__all__ = ["fit_model_previews"]


def fit_model_previews(
    pipeline: LaMambaPipeline, *, num_images: int, num_inference_steps: int = 20
) -> tuple[PreviewMap, float]:
    """The map fitted to images that the model itself makes, of its classes in turn; as `fit_preview_map`.

    Raises ValueError for fewer than 1 image.
    """
    if num_images < 1:
        raise ValueError(f"num: {num_images} given; 1 or more is accepted")
    classes = pipeline.num_classes
    labels = [image % classes if classes else pipeline.null_label for image in range(num_images)]
    latents = pipeline.sample_latents(
        labels, seeds=range(num_images), num_inference_steps=num_inference_steps
    )  # (n, C, h, w)
    return fit_preview_map(latents, pipeline.autoencoder.decode(latents))
