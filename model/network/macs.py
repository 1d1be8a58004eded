"""How large a network is: parameters and multiply-adds of one image, beside the paper's figures.

The count runs the built network on the meta device and looks at the operations that it executes, by the rule
of the authors' (fvcore's): a multiply-add of a linear map, a convolution or an attention product counts 1, a
LayerNorm 5 an element (4 without affine map), a selective scan 9 * path_length * d_inner * d_state a
direction; all else (activations, AdaLN's affine maps, sums, softmax, embeddings) counts nothing. The RMSNorm
of `qk_norm` is ours to count: 4, as it has no mean to subtract.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.architecture import Architecture, architecture_fields
from model.config import LaMambaConfig
from model.network.attention import WindowAttention
from model.network.lamamba import LaMambaDiff, meta_network
from model.network.scan import ScanBackend
from model.network.scan.reference import project_dt

_NORM_MACS = 5
_NORM_MACS_WITHOUT_AFFINE = 4
_RMS_NORM_MACS = 4
_SCAN_MACS = 9
# Operations of linear maps; what else an attention module multiplies are its products of tokens.
_LINEAR = (torch.ops.aten.addmm, torch.ops.aten.mm)


@dataclass(frozen=True, kw_only=True)
class MacCount:
    """Multiply-adds of one forward of one image, by kind of operation."""

    linear: int
    convolution: int
    attention: int
    """The products with keys and with values; attention's projections count as linear."""
    norm: int
    scan: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class PublishedSize:
    """A network of the paper, the size that the paper prints for it, and why ours is another."""

    name: str
    source: str
    """The paper's table."""
    fields: Mapping[str, Any]
    """What it sets on top of LaMamba-Diff-S (`LaMambaConfig.preset` of `preset`, if that is among them)."""
    parameters: float | None
    """In 1e6; None where the paper prints none."""
    gmacs: float
    """In 1e9. The paper calls them FLOPs; its numbers are multiply-adds."""
    reason: str

    def config(self) -> LaMambaConfig:
        fields = dict(self.fields)
        return LaMambaConfig.preset(fields.pop("preset", "S"), **fields)


_MET = "met"
_NO_PROJECTIONS = (
    "the paper's parameters are met when the middle block has no AdaLN and decoder blocks of the "
    "conditioning's width do not project it; the released code has both"
)
_STATE_SIZE = "the paper's multiply-adds are met with d_state 16; the released configuration has 1"
_WIDTH = "the width is not published; 264 with d_state 8 comes nearest to both figures"
_ISOTROPIC = (
    "ours ends in the U-Net's patch expansion, whose linear map grows with the patch; the rest of the "
    "difference is unexplained"
)
_CONCATENATED = (
    "ours reduces the joined channels before the decoder's blocks; the paper's figures need wider blocks, "
    "which it does not describe"
)
_XL = {"preset": "XL"}
_ISO = {"layout": "isotropic", "hidden_size": 384, "depths": (8,), "bottleneck_depth": 0}


def _published(
    source: str, name: str, parameters: float | None, gmacs: float, reason: str, **fields: Any
) -> PublishedSize:
    return PublishedSize(
        name=name, source=source, fields=fields, parameters=parameters, gmacs=gmacs, reason=reason
    )


PUBLISHED: tuple[PublishedSize, ...] = (
    _published("Table 2", "S", 32, 3.19, _NO_PROJECTIONS),
    _published("Table 2", "B", 127, 12.32, _NO_PROJECTIONS, preset="B"),
    _published("Table 2", "L", 449, 33.39, _WIDTH, preset="L"),
    _published("Table 2", "L, d_state 8", 449, 33.39, _WIDTH, preset="L", d_state=8),
    _published("Table 2", "XL", 656, 49.90, f"{_STATE_SIZE}, its parameters with 8", **_XL),
    _published("Table 2", "XL, d_state 8", 656, 49.90, f"parameters met; {_STATE_SIZE}", **_XL, d_state=8),
    _published("Table 5", "XL, d_state 16", None, 50.46, _MET, **_XL, d_state=16),
    _published("Table 5", "XL at 512", None, 201.20, _STATE_SIZE, **_XL, sample_size=64),
    _published("Table 5", "XL at 512, d_state 16", None, 201.20, _MET, **_XL, sample_size=64, d_state=16),
    _published("Table 5", "XL at 1024", None, 804.18, _STATE_SIZE, **_XL, sample_size=128),
    _published("Table 5", "XL at 1024, d_state 16", None, 804.18, _MET, **_XL, sample_size=128, d_state=16),
    _published("Table 3", "w/o attention", None, 2.45, _MET, attention="none"),
    _published("Table 3", "w/o shifting", None, 3.19, _MET, attention="window"),
    _published("Table 3", "global attention", None, 4.24, _MET, attention="global"),
    _published(
        *("Table 4", "down-sampling 1x", 30, 6.99, _MET),
        num_downsamplings=1,
        hidden_size=144,
        depths=(2, 2, 2),
    ),
    _published(
        *("Table 4", "down-sampling 3x", 33, 1.93),
        f"{_NO_PROJECTIONS}; its multiply-adds are unexplained: this width needs fewer",
        num_downsamplings=3,
        hidden_size=48,
        depths=(2, 2, 2, 2),
    ),
    _published(
        *("Table 4", "decoder -1", 32, 3.08, _NO_PROJECTIONS), hidden_size=104, decoder_extra_block=False
    ),
    _published(
        *("Table 4", "all +1", 33, 3.51),
        f"{_NO_PROJECTIONS}; 9 % of its multiply-adds are unexplained",
        hidden_size=80,
        depths=(3, 3, 3, 0),
        bottleneck_depth=2,
    ),
    _published(
        *("Table 4", "all -1", 35, 2.93),
        "unexplained; without the middle block the difference would be larger",
        hidden_size=112,
        depths=(1, 1, 1, 0),
    ),
    _published("Table 4", "isotropic, patch 1", 34, 24.96, _ISOTROPIC, **_ISO, patch_size=1),
    _published("Table 4", "isotropic, patch 2", 34, 6.19, _ISOTROPIC, **_ISO, patch_size=2),
    _published("Table 4", "isotropic, patch 4", 34, 1.96, _ISOTROPIC, **_ISO, patch_size=4),
    _published("Table 4", "isotropic, patch 8", 34, 0.65, _ISOTROPIC, **_ISO, patch_size=8),
    _published("Table 4", "concatenated skips", 33, 3.02, _CONCATENATED, hidden_size=64, skip="concat"),
)


def count_parameters(config: LaMambaConfig) -> int:
    """Parameters of the network that `config` builds."""
    return sum(parameter.numel() for parameter in meta_network(config).parameters())


def count_macs(config: LaMambaConfig) -> MacCount:
    """Multiply-adds of one image of `config.sample_size` latents a side, by this module's rule."""
    return count_forward_macs(meta_network(config))


def count_forward_macs(network: LaMambaDiff) -> MacCount:
    """Multiply-adds of the next forward of one image by a network on the meta device, which keeps the scan
    that only counts.
    """
    config = network.architecture
    scans: list[int] = []
    qk_norms: list[int] = []
    hooks = [
        module.register_forward_pre_hook(_counting_qk_norm(qk_norms))
        for module in network.modules()
        if isinstance(module, WindowAttention) and module.qk_norm_weight is not None
    ]
    network.use_scan_backend(ScanBackend("counting", _counting_scan(scans)))
    # FlopCounterMode counts a multiply-add as 2.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.native_layer_norm: _layer_norm_flops}
    )
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    with torch.no_grad(), counter:
        network(latents, torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    for hook in hooks:
        hook.remove()
    by_module = counter.get_flop_counts()
    total: Counter[Any] = Counter(by_module["Global"])
    attention = sum(
        flops
        for name, counts in by_module.items()
        if name.endswith(".attention")
        for operation, flops in counts.items()
        if operation not in _LINEAR
    )
    norm = total.pop(torch.ops.aten.native_layer_norm)
    convolution = total.pop(torch.ops.aten.convolution, 0)
    return MacCount(
        linear=(total.total() - attention) // 2,
        convolution=convolution // 2,
        attention=attention // 2,
        norm=norm // 2 + sum(qk_norms),
        scan=sum(scans),
    )


def describe(config: LaMambaConfig) -> dict[str, Any]:
    """`config`'s size as JSON-able values.

    `parameters`; `gmacs` in 1e9 and its `breakdown` by kind of operation; `paper`: the published figures if
    the configuration is a published one, else None.
    """
    network = meta_network(config)
    macs = count_forward_macs(network)
    published = next((row for row in PUBLISHED if row.config() == config), None)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gmacs": macs.total / 1e9,
        "breakdown": {kind: count / 1e9 for kind, count in dataclasses.asdict(macs).items()},
        "paper": published and _printed(published),
    }


def paper_table() -> list[dict[str, Any]]:
    """Every network whose size the paper prints: ours beside the paper's, and why they differ.

    Rows have `name`, `source` (the paper's table), `config` (fields, with the kind), `parameters`, `gmacs`
    (in 1e9), `paper_parameters_millions` (None where it prints none), `paper_gmacs` and `reason`.
    """
    rows = []
    for row in PUBLISHED:
        config = row.config()
        rows.append(size_beside_paper(row.name, config, describe(config), _printed(row)))
    return rows


def size_beside_paper(
    name: str, architecture: Architecture, size: Mapping[str, Any], printed: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of `paper_table`; `printed` is what `describe` has under `paper`."""
    return {
        "name": name,
        "source": printed["source"],
        "config": architecture_fields(architecture),
        "parameters": size["parameters"],
        "gmacs": size["gmacs"],
        "paper_parameters_millions": printed["parameters_millions"],
        "paper_gmacs": printed["gmacs"],
        "reason": printed["reason"],
    }


def _printed(row: PublishedSize) -> dict[str, Any]:
    return {
        "source": row.source,
        "parameters_millions": row.parameters,
        "gmacs": row.gmacs,
        "reason": row.reason,
    }


def _counting_scan(counts: list[int]) -> Callable[..., Tensor]:
    """A scan backend that projects dt and appends what else it would compute to `counts`."""

    def selective_scan(
        u: Tensor, dt: Tensor, dt_proj_weight: Tensor, A_log: Tensor, *others: Tensor
    ) -> Tensor:
        project_dt(dt, dt_proj_weight)
        _, d_inner, d_state = A_log.shape
        paths = others[-1]  # (directions, path_length)
        counts.append(_SCAN_MACS * len(u) * paths.numel() * d_inner * d_state)
        return torch.empty_like(u, dtype=torch.float32).unsqueeze(2)

    return selective_scan


def _counting_qk_norm(counts: list[int]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook of an attention module that appends what norms its queries and keys to `counts`."""

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        counts.append(2 * _RMS_NORM_MACS * inputs[0].numel())

    return count


def _layer_norm_flops(x: torch.Size, normalized_shape: object, weight: object, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * (_NORM_MACS if weight is not None else _NORM_MACS_WITHOUT_AFFINE)
