"""Snapshots of the power-function averages, in fp16, and averages of other lengths made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.messages import one_line
from model.training.averages import snapshot_weights, track_name
from model.whole_file import whole_file

__all__ = ["average_of_length", "missing_snapshots", "take_back_snapshots", "write_snapshot"]

_NAME = re.compile(r"averages-(\d+)\.safetensors")
_TRACKS = "sigma_rel"


def write_snapshot(folder: Path, images_seen: int, tracks: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write the averages, by their sigma_rel and by parameter, as they are after so many images."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{track_name(sigma_rel)}/{name}": tensor.to("cpu", torch.float16).contiguous()
        for sigma_rel, average in tracks.items()
        for name, tensor in average.items()
    }
    with whole_file(folder / f"averages-{images_seen:012d}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={_TRACKS: " ".join(map(str, tracks))})


def take_back_snapshots(folder: Path, images_seen: int) -> None:
    """Remove those of steps that are taken again, perhaps otherwise: an average has one run's alone."""
    for images, path in _files(folder).items():
        if images > images_seen:
            path.unlink()


def missing_snapshots(folder: Path, num_images: int, *, every: int) -> int:
    """How many a run of `num_images` has still to write, one each `every` images; 0 writes none."""
    return max(-(-num_images // every) - len(_files(folder)), 0) if every else 0


def average_of_length(
    folder: Path, sigma_rel: float, *, images_seen: int | None = None
) -> tuple[dict[str, Tensor], int]:
    """The average of length `sigma_rel` at a snapshot's time, by default the last, and that time in images.

    By parameter, fp32 on the CPU. Raises ValueError where the snapshots are too few.
    """
    files = _files(folder)
    if not files or (images_seen is not None and images_seen not in files):
        raise ValueError(
            f"sigma_rel: {folder} has no snapshot of {images_seen or 'any'} images; a run with ema_tracks "
            "and snapshot_every writes them"
        )
    time = max(files) if images_seen is None else images_seen
    taken: list[tuple[int, float]] = []
    for images, path in sorted(files.items()):
        if images <= time:
            taken += [(images, sigma) for sigma in _tracks(path)]
    weights = snapshot_weights(taken, time=time, sigma_rel=sigma_rel)
    average: dict[str, Tensor] = {}
    for (images, sigma), weight in zip(taken, weights.tolist(), strict=True):
        prefix = f"{track_name(sigma)}/"
        with safe_open(files[images], framework="pt") as file:
            for key in [key for key in list(file.keys()) if key.startswith(prefix)]:
                name = key.removeprefix(prefix)
                part = file.get_tensor(key)
                average.setdefault(name, torch.zeros(part.shape)).add_(part, alpha=weight)
    return average, time


def _tracks(path: Path) -> list[float]:
    try:
        with safe_open(path, framework="pt") as file:
            return [float(sigma) for sigma in file.metadata()[_TRACKS].split()]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"sigma_rel: {path} cannot be read ({one_line(error)}); without that file the others are taken"
        ) from error


def _files(folder: Path) -> dict[int, Path]:
    """By images."""
    return {int(match.group(1)): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
