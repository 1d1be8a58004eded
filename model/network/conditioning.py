"""All AdaLN vectors of a network at once: the conditioning of its blocks as a few matrix products.

Layer by layer it is two products and a SiLU each, some 70 launches in XL, which read a quarter of its weights
for a handful of rows. But all depend on c alone, so that here one product serves the projections of all
layers, and one batched product the modulations of all layers of a width.

Legend: B rows, C the conditioning's width, d a layer's, V the sum of the widths of all AdaLN vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConditionedLayer", "ConditioningStack"]


class ConditionedLayer(Protocol):
    """A layer whose AdaLN vectors are modulation(SiLU(conditioning_proj(c)))."""

    @property
    def conditioning_proj(self) -> nn.Module: ...
    @property
    def modulation(self) -> nn.Linear: ...


class ConditioningStack(nn.Module):
    """c `(B, C)` to the AdaLN vectors of all layers in their order, `(B, V)`; for inference.

    It moves the layers' weights into tensors of its own, of which they become views: nothing is held twice,
    and new values that are copied into the layers reach it. Casting or moving the network ends that; make a
    new stack afterwards.
    """

    projection_weight: Tensor
    projection_bias: Tensor

    def __init__(self, layers: Sequence[ConditionedLayer]) -> None:
        super().__init__()
        linears = [p for p in (layer.conditioning_proj for layer in layers) if isinstance(p, nn.Linear)]
        self.projected_widths = tuple(linear.out_features for linear in linears)
        self.has_projection = tuple(isinstance(layer.conditioning_proj, nn.Linear) for layer in layers)
        self._hold("projection", linears, stacked=False)
        shapes = [layer.modulation.weight.shape for layer in layers]
        self.groups = tuple(
            tuple(i for i, other in enumerate(shapes) if other == shape) for shape in dict.fromkeys(shapes)
        )
        for number, group in enumerate(self.groups):
            self._hold(f"modulation_{number}", [layers[i].modulation for i in group], stacked=True)

    @torch.no_grad()
    def _hold(self, name: str, linears: Sequence[nn.Linear], *, stacked: bool) -> None:
        for kind in ("weight", "bias"):
            parameters = [getattr(linear, kind) for linear in linears]
            joined = torch.stack(parameters) if stacked else torch.cat(parameters)
            self.register_buffer(f"{name}_{kind}", joined, persistent=False)
            parts = joined if stacked else joined.split([len(p) for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part

    def forward(self, c: Tensor) -> Tensor:
        projected = F.silu(F.linear(c, self.projection_weight, self.projection_bias))
        own = iter(projected.split(self.projected_widths, dim=-1))
        shared = F.silu(c)
        inputs = [next(own) if has_projection else shared for has_projection in self.has_projection]
        vectors: list[Tensor] = [c] * len(inputs)
        for number, group in enumerate(self.groups):
            weight, bias = (getattr(self, f"modulation_{number}_{kind}") for kind in ("weight", "bias"))
            x = torch.stack([inputs[i] for i in group])  # (layers, B, d)
            outputs = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))  # (layers, B, 9d)
            for i, output in zip(group, outputs, strict=True):
                vectors[i] = output
        return torch.cat(vectors, dim=-1)
