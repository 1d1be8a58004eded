"""Rough pictures of unfinished images, without the decoder: one linear map from a latent pixel to a colour.

    colour (3,) in [-1, 1] = weight (3, C) @ latent pixel (C,) + bias (3,)

fitted by least squares to decoded pixels that are averaged over the square of each latent pixel. A picture
has the size of the latents, costs 3 C multiply-adds a pixel and shows layout and colour, no detail. The map
is `preview.json` in the model's folder; without it a model has no previews.

Legend: n images, C latent channels, h, w latent positions, H, W pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from model.autoencoder import to_pixels
from model.messages import one_line
from model.whole_file import write_json

__all__ = [
    "PREVIEW_FILE",
    "PreviewMap",
    "fit_preview_map",
    "read_preview_map",
    "write_preview_map",
]

PREVIEW_FILE = "preview.json"
_DECIMALS = 6  # a thousandth of what a step of 1/255 needs


@dataclass(frozen=True, kw_only=True, eq=False)
class PreviewMap:
    """The map of one model, fp32 on one device."""

    weight: Tensor
    """(3, C)."""
    bias: Tensor
    """(3,)."""

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels `(n, h, w, 3)` uint8 of latents `(n, C, h, w)` fp32; what is not finite is grey."""
        images = torch.einsum("oc,nchw->nohw", self.weight, latents) + self.bias[:, None, None]
        return to_pixels(images.nan_to_num(0.0, 0.0, 0.0))

    def to(self, device: torch.device) -> PreviewMap:
        """The same map on another device."""
        return PreviewMap(weight=self.weight.to(device), bias=self.bias.to(device))


def fit_preview_map(latents: Tensor, images: Tensor) -> tuple[PreviewMap, float]:
    """The map from latents `(n, C, h, w)` to their images `(n, 3, H, W)` in [-1, 1], on the CPU, and the
    share of the colours' variance that it explains, at most 1.
    """
    latents, images = latents.double().cpu(), images.double().cpu()
    channels, height, width = latents.shape[1:]
    pixels = latents.movedim(1, -1).reshape(-1, channels)  # (n h w, C)
    inputs = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)  # (n h w, C + 1)
    colours = adaptive_avg_pool2d(images, (height, width)).movedim(1, -1).reshape(-1, 3)
    solution = torch.linalg.lstsq(inputs, colours).solution  # (C + 1, 3)
    residual = (inputs @ solution - colours).square().mean()
    explained = 1.0 - residual / colours.var(dim=0, correction=0).mean()
    fitted = PreviewMap(weight=solution[:-1].T.float().contiguous(), bias=solution[-1].float())
    return fitted, float(explained)


def write_preview_map(folder: Path, preview_map: PreviewMap) -> None:
    """Write the map into a model's folder."""
    fields = {"weight": preview_map.weight, "bias": preview_map.bias}
    rounded = {
        name: torch.round(value.double(), decimals=_DECIMALS).tolist() for name, value in fields.items()
    }
    write_json(folder / PREVIEW_FILE, rounded)


def read_preview_map(folder: Path, *, latent_channels: int) -> PreviewMap | None:
    """The map of a model's folder, on the CPU; None where there is none.

    Raises ValueError, one line, for a file that is damaged or made for another number of channels.
    """
    path = folder / PREVIEW_FILE
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        weight, bias = (torch.tensor(fields[name], dtype=torch.float32) for name in ("weight", "bias"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a preview map ({one_line(error)}); without it, `lamamba fit-previews` makes one"
        ) from error
    if weight.shape != (3, latent_channels) or bias.shape != (3,):
        raise ValueError(
            f"{path}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} given; "
            f"(3, {latent_channels}) and (3,) are accepted"
        )
    return PreviewMap(weight=weight, bias=bias)
