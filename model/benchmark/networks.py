"""The networks that are compared, with random weights, and their multiply-adds.

Ours is LaMamba-Diff of a preset. The peer is DiT of the same size with patches of 2 (Peebles & Xie 2023,
table 1), as diffusers' `DiTTransformer2DModel`. In diffusers each block has its own copy of the embedding of
(t, y), which converted checkpoints fill with 28 times the same weights; here the blocks share one, which
makes DiT-XL/2 the 675 M parameters of its paper and changes no kernel. The form "one-embedding" also
evaluates it once a forward, as DiT's own code does, instead of once a block.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from model.benchmark.config import architecture
from model.network.lamamba import LaMambaDiff

__all__ = ["DTYPES", "DiTSize", "EmbeddedOnce", "build_dit", "build_lamamba", "dit_macs", "optimize", "twin"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class DiTSize:
    """A DiT with patches of 2 on 4 latent channels."""

    num_layers: int
    num_heads: int
    head_dim: int
    num_classes: int = 1000

    @classmethod
    def of(cls, preset: str) -> DiTSize:
        """DiT's size of the same name."""
        return _DIT_SIZES[preset]


_DIT_SIZES = {
    "tiny": DiTSize(num_layers=2, num_heads=2, head_dim=8, num_classes=10),
    "S": DiTSize(num_layers=12, num_heads=6, head_dim=64),
    "B": DiTSize(num_layers=12, num_heads=12, head_dim=64),
    "L": DiTSize(num_layers=24, num_heads=16, head_dim=64),
    "XL": DiTSize(num_layers=28, num_heads=16, head_dim=72),
}
_PATCH, _IN_CHANNELS, _OUT_CHANNELS, _FREQUENCIES = 2, 4, 8, 256


def build_lamamba(
    preset: str,
    side: int,
    *,
    d_state: int,
    device: torch.device,
    dtype: torch.dtype,
    trainable: bool = False,
) -> LaMambaDiff:
    """Ours with random weights, modulations included (zeros would make every block the identity).

    `trainable`: in train mode and with gradients, rather than made ready for inference.
    """
    torch.manual_seed(0)
    with device:
        network = LaMambaDiff(**dataclasses.asdict(architecture(preset, side, d_state=d_state)))
    for name, parameter in network.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.02)
    if trainable:
        return _trainable(network, dtype)
    frozen: LaMambaDiff = _frozen(network, dtype)
    frozen.stack_conditioning()
    return frozen


def build_dit(
    preset: str, side: int, *, device: torch.device, dtype: torch.dtype, trainable: bool = False
) -> DiTTransformer2DModel:
    """The peer with torch's random weights, of which none is zero; `trainable` as in `build_lamamba`."""
    torch.manual_seed(0)
    size = DiTSize.of(preset)
    with device:
        network = DiTTransformer2DModel(
            num_attention_heads=size.num_heads,
            attention_head_dim=size.head_dim,
            in_channels=_IN_CHANNELS,
            out_channels=_OUT_CHANNELS,
            num_layers=size.num_layers,
            sample_size=side,
            patch_size=_PATCH,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=size.num_classes,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
    first, *others = _blocks(network)
    for block in others:
        block.norm1.emb = first.norm1.emb
    return (_trainable if trainable else _frozen)(network.to(device), dtype)


def dit_macs(preset: str, side: int) -> dict[str, int]:
    """Multiply-adds of one row of DiT: `total`, and of it `attention` (the products of tokens).

    With T = (side / 2)^2 tokens, width d and n layers: 12 d^2 T + 2 d T^2 a layer, of which the second term
    is attention's; 6 d^2 a layer, 2 d^2 for the final layer and (256 + d) d for t once, whatever T; 16 d T
    to embed patches and 32 d T to predict them. DiT's paper prints 118.64 G and 524.60 G for XL/2 at sides 32
    and 64: this rule is within 0.02 % of both.
    """
    size = DiTSize.of(preset)
    d, n, tokens = size.num_heads * size.head_dim, size.num_layers, (side // _PATCH) ** 2
    attention = n * 2 * d * tokens**2
    linear = n * 12 * d**2 * tokens + _PATCH**2 * (_IN_CHANNELS + _OUT_CHANNELS) * d * tokens
    conditioning = (6 * n + 2) * d**2 + (_FREQUENCIES + d) * d
    return {"total": attention + linear + conditioning, "attention": attention}


class EmbeddedOnce(nn.Module):
    """A DiT whose embedding of (t, y) is evaluated once a forward and handed to the blocks."""

    def __init__(self, network: DiTTransformer2DModel) -> None:
        super().__init__()
        self.network = network
        self.embedding = _blocks(network)[0].norm1.emb
        for block in _blocks(network):
            block.norm1.emb = _GivenEmbedding()

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> Transformer2DModelOutput:
        c = self.embedding(timestep, class_labels, hidden_dtype=hidden_states.dtype)  # (B, d)
        return self.network(hidden_states, timestep=c, class_labels=class_labels)

    def compile_repeated_blocks(self, **options: Any) -> None:
        """What diffusers' models of this name do, for those that say which of their blocks repeat."""
        for block in _blocks(self.network):
            block.compile(**options)


class _GivenEmbedding(nn.Module):
    """In a block's place of the embedding: what the block is given for its timestep is the embedding."""

    def forward(
        self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        return timestep


def twin(network: nn.Module) -> Any:
    """A copy of `network` that has the same tensors: compiled or with another backend, it costs no memory."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def optimize(network: nn.Module, level: str) -> None:
    """Have `network` compiled at its first call, as `level` of `config.LEVELS` says."""
    if level == "eager":
        return
    if level == "compile-blocks":
        names = ("LaMambaBlock", "BasicTransformerBlock")
        for module in [module for module in network.modules() if type(module).__name__ in names]:
            module.compile(dynamic=False, fullgraph=True)
        return
    mode = "max-autotune-no-cudagraphs" if level == "max-autotune" else None
    network.compile(dynamic=False, fullgraph=True, mode=mode)


def _blocks(network: DiTTransformer2DModel) -> list[Any]:
    return list(network.transformer_blocks)


def _frozen(network: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(network, dtype=dtype).eval().requires_grad_(False)


def _trainable(network: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(network, dtype=dtype).train().requires_grad_(True)
