"""The shipped models: LaMamba-Diff trained on `places`, one folder a resolution, in diffusers' pipeline
layout.
"""

from __future__ import annotations

from pathlib import Path

PRETRAINED_RESOLUTIONS: tuple[int, ...] = (128, 256)


def default_model_dir(resolution: int) -> Path:
    """The folder of the shipped model that makes images of `resolution` pixels a side, 128 or 256."""
    if resolution not in PRETRAINED_RESOLUTIONS:
        accepted = " or ".join(map(str, PRETRAINED_RESOLUTIONS))
        raise ValueError(f"resolution: {resolution} given; the shipped models make {accepted} pixels")
    return Path(__file__).parent / f"places-{resolution}"
