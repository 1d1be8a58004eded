"""Endless perspective views of 21 real places, rendered from the 25 panoramas packaged beside this file.

A view is a pure function of its id: a counter-based generator draws class, panorama, yaw, pitch, field of
view and flip, so that any batch on any device holds the same views and a training run needs no stored
generator state. Ids from `RESERVED_VIEW_IDS` on are never trained on. They show the same panoramas from other
directions, so they measure interpolation, not generalisation to new places.

Pinhole model: with x, y in [-t, t], t = tan(fov / 2), the ray (x, y, 1) is tilted by the pitch and turned by
the yaw, and its longitude and latitude address the equirectangular panorama:
    longitude = yaw + atan2(x, cos(pitch) - y sin(pitch))
    latitude  = atan2(sin(pitch) + y cos(pitch), hypot(x, cos(pitch) - y sin(pitch)))

All panoramas lie in one atlas, stacked and each framed by one texel (wrapped left and right, repeated at the
poles): one `grid_sample` serves a batch of views from panoramas of different sizes, and no seam shows.

Legend: n views, S side of a view, T = 2S side of its supersampled rendering, P panoramas.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from model.diffusion.noise import philox_uniform

__all__ = ["RESERVED_VIEW_IDS", "Places", "Views"]

RESERVED_VIEW_IDS = 2**40
"""Views with this id or a larger one are for tests and evaluation."""

PITCH_DEGREES = (-12.0, 18.0)
FIELD_OF_VIEW_DEGREES = (50.0, 85.0)
SUPERSAMPLING = 2

_STREAM = 0x506C6163  # "Plac": keeps these draws apart from other users of the same generator and seed
_SAMPLES_PER_CHUNK = 2**23  # bounds what a call holds at a time: about 40 bytes a sample


@dataclass(frozen=True, kw_only=True)
class Views:
    """Camera parameters of n views, tensors (n,) on one device."""

    class_ids: Tensor
    """int64, index into `Places.labels`."""
    panoramas: Tensor
    """int64, index of the panorama."""
    yaw: Tensor
    """fp32 radians in [0, 2 pi); 0 looks at the panorama's middle column, more looks further right."""
    pitch: Tensor
    """fp32 radians; positive looks up."""
    field_of_view: Tensor
    """fp32 radians, from edge to edge, equal in both directions."""
    flip: Tensor
    """bool: mirrored left to right."""

    def __getitem__(self, index: slice) -> Views:
        return Views(**{name: tensor[index] for name, tensor in vars(self).items()})


class Places:
    """Panoramas with labels, and the renderer of their views, on one device."""

    def __init__(
        self,
        *,
        labels: Sequence[str],
        panoramas: Sequence[NDArray[np.uint8]],
        class_ids: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """`panoramas[i]`: (height, width, 3) uint8 sRGB of class `class_ids[i]`; no label is without one."""
        members = [[i for i, c in enumerate(class_ids) if c == label] for label in range(len(labels))]
        if len(panoramas) != len(class_ids) or sum(map(len, members)) != len(class_ids) or not all(members):
            raise ValueError(
                f"class_ids: {list(class_ids)} given for {len(panoramas)} panoramas; accepted is one class "
                f"in 0 to {len(labels) - 1} for each, with no class left out"
            )
        self.labels: tuple[str, ...] = tuple(labels)
        digest = hashlib.sha256(repr((self.labels, tuple(class_ids))).encode())
        for image in panoramas:
            digest.update(image.tobytes())
        self.digest = digest.hexdigest()
        self.device = torch.device(device)
        sizes = [(image.shape[0], image.shape[1]) for image in panoramas]
        tops = np.cumsum([0] + [height + 2 for height, _ in sizes])
        atlas = torch.zeros(3, int(tops[-1]), max(width for _, width in sizes) + 2)
        for image, top in zip(panoramas, tops[:-1], strict=True):
            framed = np.pad(np.pad(image, ((0, 0), (1, 1), (0, 0)), "wrap"), ((1, 1), (0, 0), (0, 0)), "edge")
            pixels = torch.from_numpy(framed.astype(np.float32)).movedim(-1, 0) / 127.5 - 1
            atlas[:, top : top + pixels.shape[1], : pixels.shape[2]] = pixels
        self._atlas = atlas.to(self.device)  # (3, sum of heights + 2P, largest width + 2), in [-1, 1]
        self._tops = torch.tensor(tops[:-1], dtype=torch.float32, device=self.device)  # (P,)
        self._sizes = torch.tensor(sizes, dtype=torch.float32, device=self.device)  # (P, 2) height, width
        # Row c lists the panoramas of class c, padded with its first, which is never drawn from the padding.
        longest = max(map(len, members))
        self._members = torch.tensor([m + m[:1] * (longest - len(m)) for m in members], device=self.device)
        self._num_members = torch.tensor([len(m) for m in members], device=self.device)

    @classmethod
    def load(cls, folder: Path | str | None = None, *, device: torch.device | str = "cpu") -> Places:
        """Read `places.json` and its panoramas from `folder`, or from the package's own data without one."""
        root: Traversable = files("model.data") / "places" if folder is None else Path(folder)
        try:
            index = json.loads((root / "places.json").read_text(encoding="utf-8"))
            entries = index["panoramas"]
            images = [_read_image(root / entry["file"]) for entry in entries]
            class_ids = [int(entry["class_id"]) for entry in entries]
            labels = [str(label) for label in index["labels"]]
        except (OSError, KeyError, TypeError, json.JSONDecodeError, UnidentifiedImageError) as error:
            raise ValueError(
                f"folder: {root} given; accepted is a folder with a places.json (labels, panoramas with file "
                f"and class_id) and the images that it names ({type(error).__name__}: {error})"
            ) from error
        return cls(labels=labels, panoramas=images, class_ids=class_ids, device=device)

    def views(self, view_ids: Tensor) -> Views:
        """Camera parameters of the views with these ids, (n,) int64: each a function of its own id alone."""
        view_ids = view_ids.to(self.device)
        streams = torch.full_like(view_ids, _STREAM)
        uniform = philox_uniform(view_ids, streams, torch.zeros_like(view_ids), 6)  # (n, 6) float64 in [0, 1)
        class_ids = (uniform[:, 0] * len(self.labels)).long()
        member = (uniform[:, 1] * self._num_members[class_ids]).long()
        pitch, field_of_view = (
            torch.deg2rad(low + (high - low) * uniform[:, column]).float()
            for column, (low, high) in ((3, PITCH_DEGREES), (4, FIELD_OF_VIEW_DEGREES))
        )
        return Views(
            class_ids=class_ids,
            panoramas=self._members[class_ids, member],
            yaw=(2 * math.pi * uniform[:, 2]).float(),
            pitch=pitch,
            field_of_view=field_of_view,
            flip=uniform[:, 5] < 0.5,
        )

    @torch.no_grad()
    def render(self, view_ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Images (n, 3, size, size) fp32 in [-1, 1] and labels (n,) int64 of the views with these ids."""
        views = self.views(view_ids)
        return self.render_views(views, size), views.class_ids

    @torch.no_grad()
    def render_views(self, views: Views, size: int) -> Tensor:
        """Images (n, 3, size, size) fp32 in [-1, 1] of given cameras; a pixel averages 2 x 2 samples."""
        if size < 1:
            raise ValueError(f"size: {size} given; accepted is 1 or more pixels")
        num_views = views.yaw.shape[0]
        images = torch.empty(num_views, 3, size, size, device=self.device)
        chunk = max(1, _SAMPLES_PER_CHUNK // (SUPERSAMPLING * size) ** 2)
        for start in range(0, num_views, chunk):
            images[start : start + chunk] = self._render_chunk(views[start : start + chunk], size)
        return images

    def _render_chunk(self, views: Views, size: int) -> Tensor:
        """(n, 3, S, S): rays -> directions -> atlas coordinates -> bilinear samples -> box filter."""
        side = SUPERSAMPLING * size
        ramp = (torch.arange(side, dtype=torch.float32, device=self.device) + 0.5) * (2 / side) - 1  # (T,)
        extent = torch.tan(views.field_of_view / 2)[:, None]  # (n, 1)
        x = (ramp * torch.where(views.flip[:, None], -extent, extent))[:, None, :]  # (n, 1, T)
        y = -ramp * extent  # (n, T), up
        sin, cos = torch.sin(views.pitch)[:, None], torch.cos(views.pitch)[:, None]
        forward = (cos - y * sin)[:, :, None]  # (n, T, 1)
        up = (sin + y * cos)[:, :, None]  # (n, T, 1)

        longitude = torch.atan2(x, forward) + views.yaw[:, None, None]  # (n, T, T)
        u = torch.remainder(longitude / (2 * math.pi) + 0.5, 1.0)  # left to right, 0.5 is the middle column
        v = 0.5 - torch.atan2(up, torch.hypot(x, forward)) / math.pi  # top to bottom

        heights, widths = self._sizes[views.panoramas].unbind(1)  # (n,)
        tops = self._tops[views.panoramas]
        _, atlas_height, atlas_width = self._atlas.shape
        # grid_sample's coordinate of a point p (in texels from the atlas's edge) is 2 p / extent - 1.
        column = (u * widths[:, None, None] + 1) * (2 / atlas_width) - 1
        row = (v * heights[:, None, None] + (tops + 1)[:, None, None]) * (2 / atlas_height) - 1
        grid = torch.stack((column, row), dim=-1).view(1, -1, side, 2)  # (1, nT, T, 2)
        samples = F.grid_sample(
            self._atlas[None], grid, mode="bilinear", align_corners=False
        )  # (1, 3, nT, T)
        return F.avg_pool2d(samples, SUPERSAMPLING)[0].view(3, -1, size, size).movedim(0, 1)


def _read_image(path: Traversable) -> NDArray[np.uint8]:
    with path.open("rb") as stream, Image.open(stream) as image:
        return np.asarray(image.convert("RGB"))
