"""The authors' networks in tests/golden (see its README), and activations of ours by the files' names."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from model.authors_format import from_authors, to_authors
from model.config import LaMambaConfig
from model.network.lamamba import LaMambaDiff
from model.network.residual import Residual

FOLDER = Path(__file__).parent / "golden"
NETWORKS = ("xl-like", "s-like", "n8-plain", "no-attention", "patch2", "unconditional")
MAX_ABS = 2e-5  # of outputs and activations, fp32: the authors' own fp32 is up to 7e-6 from float64
MAX_ABS_GUIDED = 5e-5  # guidance of 4 multiplies errors by up to 7


@dataclass(frozen=True)
class GoldenNetwork:
    """One golden file: `tensors` are inputs, output, activations; `weights` the authors' state dict."""

    config: LaMambaConfig
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def build(self) -> LaMambaDiff:
        network = LaMambaDiff(**dataclasses.asdict(self.config)).eval()
        network.load_state_dict(from_authors(self.weights, self.config)[0])
        return network

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["x"], self.tensors["t"], self.tensors["y"]


@lru_cache
def load_golden(name: str) -> GoldenNetwork:
    """The file `name`; weights that it leaves out (they reach none of its numbers) are filled in."""
    data = lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    config = _config(json.loads(header["__metadata__"]["config"]))
    tensors = {key: _single(value) for key, value in load(data).items()}
    weights = to_authors(LaMambaDiff(**dataclasses.asdict(config)))
    for key in [key for key in tensors if key.startswith("sd.")]:
        value, full = tensors.pop(key), weights[key.removeprefix("sd.")]
        if value.shape != full.shape:  # the modulation of a block without its attention vectors
            vssm, ffn = value.chunk(2)
            value = torch.cat([vssm, torch.zeros_like(vssm), ffn])
        weights[key.removeprefix("sd.")] = value
    return GoldenNetwork(config, weights, tensors, header["__metadata__"])


def activations(network: LaMambaDiff, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The output and every activation that the golden files have, by their names."""
    found: dict[str, Tensor] = {}
    handles = []

    def watch(module: nn.Module, *, given: str | None = None, gives: str | None = None) -> None:
        if given:
            handles.append(module.register_forward_pre_hook(_keep_input(found, given)))
        if gives:
            handles.append(module.register_forward_hook(_keep_output(found, gives)))

    first, last = network.encoder[0][0], network.encoder[0][-1]
    watch(network.final_layer.conditioning_proj, given="c")
    watch(first, given="tokens", gives="block0")
    watch(last.vssm, given="ss2d_in", gives="ss2d_out")
    watch(network.middle[0].vssm, given="ss2d_mid_in", gives="ss2d_mid_out")
    if last.has_attention:
        watch(last.attention, given="attn_in", gives="attn_out")
    for i, merging in enumerate(network.mergings):
        watch(merging, given=f"enc{i}", gives=f"enc{i}_merged")
    watch(network.expandings[0], given="middle")
    for i, following in enumerate([*network.expandings[1:], network.final_layer]):
        watch(following, given=f"dec{i}")
    watch(network.final_layer.expanding, gives="final_up")
    with torch.no_grad():
        found["out"] = network(*inputs).sample
    for handle in handles:
        handle.remove()
    return found


def _keep_input(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = _sum(args[0])

    return hook


def _keep_output(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | Residual) -> None:
        found[name] = _sum(output)

    return hook


def _sum(value: Tensor | Residual) -> Tensor:
    return value.sum() if isinstance(value, Residual) else value


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _config(fields: dict[str, Any]) -> LaMambaConfig:
    return LaMambaConfig(
        sample_size=fields["image_size_latents"],
        patch_size=fields["patch_size"],
        hidden_size=fields["dim"],
        depths=fields["depths"],
        bottleneck_depth=fields["bottleneck_depth"],
        decoder_extra_block=fields["decoder_extra_block"],
        num_classes=fields["num_classes"],
        d_state=fields["d_state"],
        conv_bias=fields["conv_bias"],
        vssm="ss2d_continuous" if fields["continuous_scan"] else "ss2d",
        num_heads=fields["heads"],
        window_size=fields["window"],
        attention="shifted_window" if fields["local_attention"] else "none",
    )
