"""Extractors of features that cost nothing and are easy to work out by hand."""

from __future__ import annotations

import torch

from model.evaluation.features import Features


class MeanColour:
    """Features that are the image's mean colour."""

    name, details, weights_hash = "mean colour", "3 means", "none"
    num_features, defines_fid, device = 3, False, torch.device("cpu")

    def __call__(self, pixels: torch.Tensor) -> Features:
        return Features(pooled=pixels.float().mean(dim=(1, 2)))


class TinyInception(MeanColour):
    """Outputs of Inception's kinds: mean colours, four pixels' reds, and classes that are the colours."""

    name, details, weights_hash, defines_fid = "Inception-v3", "tiny", "6726825d0000", True

    def __call__(self, pixels: torch.Tensor) -> Features:
        colours = pixels.float().mean(dim=(1, 2))
        return Features(
            pooled=colours,
            spatial=pixels[:, :2, :2, 0].flatten(1).float(),
            probabilities=(colours / 64).softmax(dim=1),
        )
