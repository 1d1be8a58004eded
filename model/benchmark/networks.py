"""The networks that are compared, with random weights.

Ours is LaMamba-Diff of a preset. The peer is DiT of the same size with patches of 2 (Peebles & Xie 2023,
table 1), as diffusers' `DiTTransformer2DModel`. In diffusers each block has its own copy of the embedding of
(t, y), which converted checkpoints fill with 28 times the same weights; here the blocks share one, which
makes DiT-XL/2 the 675 M parameters of its paper and changes no kernel. The form "one-embedding" also
evaluates it once a forward, as DiT's own code does, instead of once a block.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from model.benchmark.config import architecture, dit_architecture
from model.network.dit import GivenEmbedding, transformer_fields
from model.network.lamamba import LaMambaDiff

__all__ = ["DTYPES", "EmbeddedOnce", "build_dit", "build_lamamba", "optimize", "twin"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    architecture = dit_architecture(preset, side)
    with device:
        network = DiTTransformer2DModel(
            **transformer_fields(architecture), num_embeds_ada_norm=architecture.num_classes
        )
    first, *others = _blocks(network)
    for block in others:
        block.norm1.emb = first.norm1.emb
    return (_trainable if trainable else _frozen)(network.to(device), dtype)


class EmbeddedOnce(nn.Module):
    """A DiT whose embedding of (t, y) is evaluated once a forward and handed to the blocks."""

    def __init__(self, network: DiTTransformer2DModel) -> None:
        super().__init__()
        self.network = network
        self.embedding = _blocks(network)[0].norm1.emb
        for block in _blocks(network):
            block.norm1.emb = GivenEmbedding()

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
