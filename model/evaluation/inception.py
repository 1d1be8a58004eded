"""The Inception-v3 that FID is defined by: TensorFlow's graph of 2015-12-05, in torch alone.

It is not torchvision's network: average pooling leaves the padding out of the mean, the last block pools by
maximum, there are 1,008 classes, and images are resized as TensorFlow 1 did (`tf1_bilinear`). Modules bear
the names under which torch-fidelity's file `weights-inception-2015-12-05-6726825d.pth` holds the weights.

    pixels in [0, 255] -> 299 px -> (x - 128) / 128 -> stem -> Mixed_5b .. Mixed_7c -> mean over positions

Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016. The outputs that ADM's
evaluation (Dhariwal and Nichol, 2021) takes: pool_3 for FID, precision and recall; the first 7 channels of
mixed_6/conv for sFID; the softmax of the logits without their bias for the Inception Score.

Legend: n images, 17 x 17 positions of the middle blocks.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.messages import one_line

__all__ = ["INPUT_SIZE", "Inception", "InceptionOutputs", "load_inception", "tf1_bilinear"]

INPUT_SIZE = 299
_NUM_CLASSES = 1008
_SPATIAL_CHANNELS = 7
_NORM_EPS = 1e-3

Kernel = int | tuple[int, int]


class Convolution(NamedTuple):
    """Output channels and kernel of one convolution; stride 1 keeps the size, stride 2 pads nothing."""

    channels: int
    kernel: Kernel
    stride: int = 1


Step = tuple[Convolution, ...]
"""Convolutions that read the same input; their outputs are concatenated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InceptionOutputs:
    """What the network says of n images, fp32."""

    pooled: Tensor
    """(n, 2048): pool_3."""
    spatial: Tensor
    """(n, 2023): 7 channels of mixed_6/conv at 17 x 17 positions, in the order height, width, channel."""
    probabilities: Tensor
    """(n, 1008): the softmax of the logits without bias."""


class Inception(nn.Module):
    """Pixels (n, 3, H, W), fp32 in [0, 255] -> `InceptionOutputs`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, Convolution(32, 3, 2))
        self.Conv2d_2a_3x3 = _Unit(32, Convolution(32, 3), padded=False)
        self.Conv2d_2b_3x3 = _Unit(32, Convolution(64, 3))
        self.Conv2d_3b_1x1 = _Unit(64, Convolution(80, 1))
        self.Conv2d_4a_3x3 = _Unit(80, Convolution(192, 3), padded=False)
        self.Mixed_5b = _first_blocks(192, pool_channels=32)
        self.Mixed_5c = _first_blocks(256, pool_channels=64)
        self.Mixed_5d = _first_blocks(288, pool_channels=64)
        self.Mixed_6a = _Mixed(
            288,
            branch3x3=[_one(384, 3, 2)],
            branch3x3dbl=[_one(64, 1), _one(96, 3), _one(96, 3, 2)],
            halves=True,
        )
        self.Mixed_6b = _middle_blocks(768, 128)
        self.Mixed_6c = _middle_blocks(768, 160)
        self.Mixed_6d = _middle_blocks(768, 160)
        self.Mixed_6e = _middle_blocks(768, 192)
        self.Mixed_7a = _Mixed(
            768,
            branch3x3=[_one(192, 1), _one(320, 3, 2)],
            branch7x7x3=[_one(192, 1), _one(192, (1, 7)), _one(192, (7, 1)), _one(192, 3, 2)],
            halves=True,
        )
        self.Mixed_7b = _last_blocks(1280)
        self.Mixed_7c = _last_blocks(2048, max_pooled=True)
        self.fc = nn.Linear(2048, _NUM_CLASSES)

    def forward(self, pixels: Tensor) -> InceptionOutputs:
        x = (tf1_bilinear(pixels, INPUT_SIZE) - 128) / 128  # (n, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (n, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))  # (n, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))  # (n, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (n, 768, 17, 17)
        spatial = self.Mixed_6d["branch1x1"](x)[:, :_SPATIAL_CHANNELS]  # (n, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (n, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return InceptionOutputs(
            pooled=pooled,
            spatial=spatial.movedim(1, -1).flatten(1),
            probabilities=F.linear(pooled, self.fc.weight).softmax(dim=1),
        )


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, convolution: Convolution, *, padded: bool = True) -> None:
        super().__init__()
        channels, kernel, stride = convolution
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.ModuleDict):
    """Branches of convolutions beside a pooled one, concatenated in the order given.

    A unit's name is its branch's, then the number of the step where there are several, then a or b where two
    units share the step.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        pool_channels: int = 0,
        halves: bool = False,
        max_pooled: bool = False,
        **branches: Sequence[Step],
    ) -> None:
        """`halves`: strides are 2 and the pooled branch is the maximum without a convolution."""
        super().__init__()
        self.halves, self.max_pooled = halves, max_pooled
        self.branches: list[list[list[str]]] = []  # names of units: by branch, step, place
        for branch, steps in branches.items():
            widths = [in_channels, *(sum(unit.channels for unit in step) for step in steps)]
            names = [_names(branch, number, len(steps), len(step)) for number, step in enumerate(steps, 1)]
            for step, step_names, (width, _) in zip(steps, names, pairwise(widths), strict=True):
                self.update({n: _Unit(width, unit) for n, unit in zip(step_names, step, strict=True)})
            self.branches.append(names)
        if not halves:
            self["branch_pool"] = _Unit(in_channels, Convolution(pool_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.branches:
            y = x
            for step in names:
                y = torch.cat([self[name](y) for name in step], dim=1) if len(step) > 1 else self[step[0]](y)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.halves:
            return _halved(x)
        if self.max_pooled:
            return self["branch_pool"](F.max_pool2d(x, 3, stride=1, padding=1))
        return self["branch_pool"](F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _names(branch: str, number: int, num_steps: int, num_units: int) -> list[str]:
    name = f"{branch}_{number}" if num_steps > 1 else branch
    return [name] if num_units == 1 else [f"{name}{letter}" for letter in "ab"[:num_units]]


def _one(channels: int, kernel: Kernel, stride: int = 1) -> Step:
    return (Convolution(channels, kernel, stride),)


def _first_blocks(in_channels: int, *, pool_channels: int) -> _Mixed:
    """At 35 x 35 positions."""
    return _Mixed(
        in_channels,
        pool_channels=pool_channels,
        branch1x1=[_one(64, 1)],
        branch5x5=[_one(48, 1), _one(64, 5)],
        branch3x3dbl=[_one(64, 1), _one(96, 3), _one(96, 3)],
    )


def _middle_blocks(in_channels: int, width: int) -> _Mixed:
    """At 17 x 17 positions."""
    across, down = (1, 7), (7, 1)
    return _Mixed(
        in_channels,
        pool_channels=192,
        branch1x1=[_one(192, 1)],
        branch7x7=[_one(width, 1), _one(width, across), _one(192, down)],
        branch7x7dbl=[
            _one(width, 1),
            _one(width, down),
            _one(width, across),
            _one(width, down),
            _one(192, across),
        ],
    )


def _last_blocks(in_channels: int, *, max_pooled: bool = False) -> _Mixed:
    """At 8 x 8 positions."""
    fork = (Convolution(384, (1, 3)), Convolution(384, (3, 1)))
    return _Mixed(
        in_channels,
        pool_channels=192,
        max_pooled=max_pooled,
        branch1x1=[_one(320, 1)],
        branch3x3=[_one(384, 1), fork],
        branch3x3dbl=[_one(448, 1), _one(384, 3), fork],
    )


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """Images (n, C, H, W) at (n, C, size, size), as TensorFlow 1's resize_bilinear: no antialias.

    Output pixel i reads at i * H / size: pixels are points at their upper left corners, not areas.
    """
    for axis in (3, 2):
        extent = images.shape[axis]
        if extent == size:
            continue
        place = torch.arange(size, dtype=images.dtype, device=images.device) * (extent / size)
        lower = place.floor().long().clamp_max(extent - 1)
        upper = (lower + 1).clamp_max(extent - 1)
        weight = (place - lower).view(-1, 1) if axis == 2 else place - lower
        first = images.index_select(axis, lower)
        images = first + (images.index_select(axis, upper) - first) * weight
    return images


def load_inception(path: Path) -> Inception:
    """The network with the weights of torch-fidelity's file, frozen, in evaluation mode, on the CPU.

    ValueError where `path` cannot be read or holds other weights.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"extractor: {path} is missing; {_ACCEPTED}") from error
    except pickle.UnpicklingError as error:  # whose text advises to load whatever it is
        raise ValueError(
            f"extractor: {path} cannot be read (no weights of torch.save); {_ACCEPTED}"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"extractor: {path} cannot be read ({one_line(error)}); {_ACCEPTED}") from error
    with torch.device("meta"):  # without drawing 24 million random weights
        network = Inception()
    wanted = {name: value.shape for name, value in network.state_dict().items() if not _is_counter(name)}
    given = weights if isinstance(weights, dict) else {}
    for name in sorted(wanted.keys() ^ {name for name in given if not _is_counter(str(name))}, key=str):
        what = f"has no {name}" if name in wanted else f"has {one_line(ValueError(name))} too"
        raise ValueError(f"extractor: {path} {what}; {_ACCEPTED}")
    for name, shape in wanted.items():
        if given[name].shape != shape:
            found = "x".join(map(str, given[name].shape))
            raise ValueError(f"extractor: {path} has {name} of shape {found}; {_ACCEPTED}")
    network.to_empty(device="cpu")
    network.load_state_dict({name: given[name] for name in wanted}, strict=False)
    return network.eval().requires_grad_(False)


_ACCEPTED = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth is accepted"


def _is_counter(name: str) -> bool:
    """Whether a name is that of batch norm's count of batches, which inference does not read."""
    return name.endswith("num_batches_tracked")
