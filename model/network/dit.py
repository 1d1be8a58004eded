"""DiT (Peebles & Xie 2023), the network that ours is compared with: diffusers' `DiTTransformer2DModel` behind
LaMambaDiff's interface, so that it trains, samples and is served like ours.

    c = embed(t) + embed(y),   tokens = patches + positions,   n blocks of attention and FFN under AdaLN-zero

In diffusers each block has an embedding of (t, y) of its own, with its own draw of which labels are dropped;
here (t, y) are embedded once a forward, as in DiT's own code, by our modules. Initial weights are those of
DiT's code: xavier linears, the block as the identity, a final layer of zeros.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from model.dit_config import DiTConfig
from model.network.embed import (
    SINUSOID_SIZE,
    LabelEmbedding,
    TimestepEmbedding,
    check_labels,
    check_latents,
    timestep_rows,
)
from model.network.scan import ScanBackend

__all__ = ["DiT", "GivenEmbedding", "dit_macs", "transformer_fields"]


class DiT(ModelMixin, ConfigMixin):
    """The network, of the fields of `DiTConfig`: `net(hidden_states, timestep, class_labels).sample`."""

    config_name: str = "config.json"  # type: ignore[assignment]  # diffusers declares None, to be set here
    # What compile_repeated_blocks compiles.
    _repeated_blocks = ("BasicTransformerBlock",)  # type: ignore[assignment]  # diffusers declares a list
    _supports_gradient_checkpointing = True

    scan_backend = "none"
    """A DiT has no scan."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        out_channels = fields.pop("out_channels", None)  # in a saved config, for diffusers' pipelines to read
        architecture = DiTConfig.from_dict(fields)
        if out_channels not in (None, architecture.out_channels):
            raise ValueError(f"out_channels: {out_channels} given; {architecture.out_channels} is accepted")
        self.register_to_config(**dataclasses.asdict(architecture), out_channels=architecture.out_channels)
        self.architecture = architecture
        self.null_label = architecture.num_classes
        width = architecture.hidden_size
        self.timestep_embed = TimestepEmbedding(width)
        self.label_embed = LabelEmbedding(architecture.num_classes, width)
        self.transformer = DiTTransformer2DModel(**transformer_fields(architecture), num_embeds_ada_norm=1)
        self.transformer.pos_embed.register_forward_hook(_in_weights_dtype)
        for block in self.transformer.transformer_blocks:
            block.norm1.emb = GivenEmbedding()
        self._initialize_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict eps and, with `learn_sigma`, the variance logits: as `LaMambaDiff.forward`."""
        check_latents(hidden_states, self.architecture.in_channels, self.architecture.patch_size)
        batch = hidden_states.shape[0]
        if class_labels is None:
            class_labels = torch.full((batch,), self.null_label, device=hidden_states.device)
        if not torch.compiler.is_compiling():
            check_labels(class_labels, self.architecture.num_classes)
        t = timestep_rows(timestep, batch, hidden_states.device)
        c = self.timestep_embed(t) + self.label_embed(class_labels)  # (B, d)
        sample: Tensor = self.transformer(hidden_states, timestep=c, return_dict=False)[0]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def use_scan_backend(self, backend: ScanBackend) -> None:
        """Change nothing: there is no scan, and attention is torch's."""

    def stack_conditioning(self) -> None:
        """Change nothing: each block makes its own AdaLN vectors, as diffusers has it."""

    @torch.no_grad()
    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.embedding.weight, std=0.02)
        nn.init.normal_(self.timestep_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embed.linear_2.weight, std=0.02)
        proj = self.transformer.pos_embed.proj
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        nn.init.zeros_(proj.bias)
        for block in self.transformer.transformer_blocks:
            # One map of d to 3d in DiT's code: its bound is that of the whole.
            for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
                bound = math.sqrt(6 / (4 * self.architecture.hidden_size))
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(self.transformer.proj_out_1.weight)
        nn.init.zeros_(self.transformer.proj_out_2.weight)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # diffusers reads the accepted fields off __init__'s signature; here their one home is DiTConfig.
        return {field.name for field in dataclasses.fields(DiTConfig)} | {"self", "out_channels"}


class GivenEmbedding(nn.Module):
    """In a block's place of the embedding: what the block is given for its timestep is the embedding."""

    def forward(
        self, timestep: Tensor, class_labels: Tensor | None, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        return timestep


def _in_weights_dtype(module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
    """Under autocast the sum over the blocks is fp32, as in DiT's code and in our finest stage: diffusers'
    embedding of patches would make it bf16.
    """
    dtype: torch.dtype = module.proj.weight.dtype  # type: ignore[union-attr, assignment]
    return tokens.to(dtype)


def transformer_fields(config: DiTConfig) -> dict[str, Any]:
    """What `DiTTransformer2DModel` is built from, all but the classes of its blocks' embeddings."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def dit_macs(config: DiTConfig) -> dict[str, int]:
    """Multiply-adds of one row of DiT: `total`, and of it `attention` (the products of tokens).

    12 d^2 T + 2 d T^2 a layer, of which the second term is attention's; 6 d^2 a layer, 2 d^2 for the final
    layer and (256 + d) d for t once, whatever T; p^2 (in + out channels) d T to embed patches and to predict
    them. DiT's paper prints 118.64 G and 524.60 G for XL/2 at sides 32 and 64: this rule is within 0.02 % of
    both.
    """
    d, n, tokens = config.hidden_size, config.num_layers, config.num_tokens
    attention = n * 2 * d * tokens**2
    patches = config.patch_size**2 * (config.in_channels + config.out_channels) * d * tokens
    conditioning = (6 * n + 2) * d**2 + (SINUSOID_SIZE + d) * d
    return {"total": attention + n * 12 * d**2 * tokens + patches + conditioning, "attention": attention}
