"""LaMamba-Diff (paper Figure 3): embed -> encoder -> middle -> decoder -> final layer, as a diffusers model.

Tokens stay channels-last `(B, H, W, width)` between the patch embedding and the final layer. Letters: B rows,
D the first stage's width, C the conditioning's, p the patch size. Checked against the authors' released code
(yunxiangfu2001/LaMamba-Diff) by the golden files of the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from model.config import LaMambaConfig, Stage
from model.network.block import LaMambaBlock
from model.network.conditioning import ConditioningStack
from model.network.embed import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    check_labels,
    check_latents,
    position_table,
    resized_position_table,
    timestep_rows,
)
from model.network.geometry import GridGeometry
from model.network.resample import AddSkip, ConcatSkip, PatchExpanding, PatchMerging
from model.network.residual import Residual, ResidualNorm
from model.network.scan import ScanBackend, resolve_scan_backend
from model.network.vssm import VisualStateSpace

_FINAL_NORM_EPS = 1e-6


class LaMambaDiff(ModelMixin, ConfigMixin):
    """The network: `net(hidden_states, timestep, class_labels).sample`.

    Built from the fields of `LaMambaConfig` by keyword:
    `LaMambaDiff(**dataclasses.asdict(LaMambaConfig.preset("XL")))`, or `LaMambaDiff.from_config(...)`,
    `LaMambaDiff.from_pretrained(folder, subfolder="transformer")`.
    """

    config_name: str = "config.json"  # type: ignore[assignment]  # diffusers declares None, to be set here
    # What compile_repeated_blocks compiles.
    _repeated_blocks = ("LaMambaBlock",)  # type: ignore[assignment]  # diffusers declares a list
    _supports_gradient_checkpointing = True

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        out_channels = fields.pop("out_channels", None)  # in a saved config, for diffusers' pipelines to read
        architecture = LaMambaConfig.from_dict(fields)
        if out_channels not in (None, architecture.out_channels):
            raise ValueError(f"out_channels: {out_channels} given; {architecture.out_channels} is accepted")
        self.register_to_config(**dataclasses.asdict(architecture), out_channels=architecture.out_channels)
        self.architecture = architecture
        self.gradient_checkpointing = False  # set by diffusers' enable_gradient_checkpointing
        self.null_label = architecture.num_classes
        self._scan_backend = resolve_scan_backend("vectorized")
        width, conditioning = architecture.hidden_size, architecture.conditioning_size

        self.timestep_embed = TimestepEmbedding(conditioning)
        self.label_embed = LabelEmbedding(architecture.num_classes, conditioning)
        self.patch_embed = PatchEmbed(architecture.in_channels, width, patch_size=architecture.patch_size)
        self.position_embed = nn.Parameter(position_table(architecture.grid_side, width))
        self._build_stages()
        self.final_layer = FinalLayer(architecture)

        self._conditioning_stack: ConditioningStack | None = None

        self.geometries = nn.ModuleDict()
        self._initialize_weights()
        self.prepare_grid(architecture.grid_side, architecture.grid_side)

    def _build_stages(self) -> None:
        encoder, decoder = self.architecture.encoder_stages, self.architecture.decoder_stages
        coarsest = encoder[-1]
        self.encoder = nn.ModuleList([self._blocks(stage, decoder=False) for stage in encoder])
        self.mergings = nn.ModuleList(
            [
                PatchMerging(stage.width, below.width)
                if below.side_divisor > stage.side_divisor
                else nn.Identity()
                for stage, below in zip(encoder, (*encoder[1:], coarsest), strict=True)
            ]
        )
        middle = dataclasses.replace(coarsest, depth=self.architecture.bottleneck_depth)
        self.middle = self._blocks(middle, decoder=False)
        self.decoder = nn.ModuleList([self._blocks(stage, decoder=True) for stage in decoder])
        self.expandings = nn.ModuleList(
            [
                PatchExpanding(below.width, stage.width, factor=2)
                if below.side_divisor > stage.side_divisor
                else nn.Identity()
                for stage, below in zip(decoder, (coarsest, *decoder[:-1]), strict=bool(decoder))
            ]
        )
        concat = self.architecture.skip == "concat"
        self.skips = nn.ModuleList([ConcatSkip(stage.width) if concat else AddSkip() for stage in decoder])

    def _blocks(self, stage: Stage, *, decoder: bool) -> nn.ModuleList:
        config = self.architecture
        return nn.ModuleList(
            [
                LaMambaBlock(
                    config,
                    stage.width,
                    window_size=self._window_size(stage.side_divisor),
                    shifted=bool(index % 2),
                    project_conditioning=decoder or stage.width != config.conditioning_size,
                    scan_backend=self._scan_backend,
                )
                for index in range(stage.depth)
            ]
        )

    def _window_size(self, side_divisor: int) -> int:
        side = self.architecture.grid_side // side_divisor
        return side if self.architecture.attention == "global" else min(self.architecture.window_size, side)

    def prepare_grid(self, height: int, width: int) -> None:
        """Build the constants of a `height` x `width` token grid (the latents' size over the patch size).

        Done at construction for the configured size and at the first forward of any other in eager mode;
        before compiling or capturing another size, call it yourself. Raises ValueError where the size does
        not fit.
        """
        multiple = self.architecture.side_multiple
        if height % multiple or width % multiple or min(height, width) < 1:
            raise ValueError(
                f"token grid: {height} x {width} given; this network accepts multiples of {multiple} a side"
            )
        for divisor in {stage.side_divisor for stage in self.architecture.encoder_stages}:
            geometry = GridGeometry(
                height // divisor,
                width // divisor,
                vssm=self.architecture.vssm,
                scan_window_size=self.architecture.scan_window_size,
                attention=self.architecture.attention,
                window_size=self._window_size(divisor),
            )
            self.geometries[_geometry_key(height, width, divisor)] = geometry.to(self.position_embed.device)

    def use_scan_backend(self, backend: ScanBackend) -> None:
        """Run the scans of all blocks with `backend` from now on, and the rest of them as it says."""
        self._scan_backend = backend
        for module in self.modules():
            if isinstance(module, VisualStateSpace):
                module.scan_backend = backend
            if hasattr(module, "use_kernels"):
                module.use_kernels = backend.kernels  # type: ignore[assignment]  # a bool, as declared

    @property
    def scan_backend(self) -> str:
        """The name of the backend in use."""
        return self._scan_backend.name

    def conditioning(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """All that the network derives from timesteps `(B,)` and labels `(B,)`: every AdaLN vector, `(B, V)`.

        `forward` takes it in their place. It depends on nothing else, so that a sampler can make it once for
        all steps of an image instead of reading a third of the weights at each.
        """
        if not torch.compiler.is_compiling():
            check_labels(class_labels, self.architecture.num_classes)
        t = timestep_rows(timestep, class_labels.shape[0], class_labels.device)
        c = self.timestep_embed(t) + self.label_embed(class_labels)  # (B, C)
        if self._conditioning_stack is not None:
            return self._conditioning_stack(c)
        return torch.cat([layer.adaln_vectors(c) for layer in self._conditioned_layers()], dim=-1)

    def stack_conditioning(self) -> None:
        """Have `conditioning` computed in a few products from now on: see `ConditioningStack`, also for what
        ends it. For inference.
        """
        self._conditioning_stack = ConditioningStack(self._conditioned_layers())

    def _conditioned_layers(self) -> list[LaMambaBlock | FinalLayer]:
        """The layers that take AdaLN vectors, in the order of the forward."""
        stages = [*self.encoder, self.middle, *self.decoder]
        return [*(block for blocks in stages for block in blocks), self.final_layer]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        *,
        conditioning: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict eps and, with `learn_sigma`, the variance logits.

        Args:
            hidden_states: noisy latents `(B, in_channels, H, W)`; H and W as `prepare_grid` accepts them.
            timestep: `(B,)` or a scalar, a number or a tensor, in the training process' steps 0..999;
                fractions are allowed.
            class_labels: `(B,)` int64, 0..num_classes, the last being the null class, which None means for
                all rows. Diffusers' null class 1000 means it too in a network of fewer than 1000 classes; in
                one of more, 1000 is a class like the others.
            return_dict: as everywhere in diffusers.
            conditioning: `(B, V)`, what `conditioning` made of timesteps and labels, instead of the two.

        Returns:
            `sample` `(B, out_channels, H, W)`: eps in the first half, variance logits in the second.
        """
        check_latents(hidden_states, self.architecture.in_channels, self.architecture.patch_size)
        batch, _, height, width = hidden_states.shape
        grids = self._grids(height // self.architecture.patch_size, width // self.architecture.patch_size)

        # Embed
        if conditioning is None:
            if timestep is None:
                raise ValueError("timestep: none given; accepted is a timestep, or conditioning in its place")
            if class_labels is None:
                class_labels = torch.full((batch,), self.null_label, device=hidden_states.device)
            t = timestep_rows(timestep, batch, hidden_states.device)
            conditioning = self.conditioning(t, class_labels)
        vectors = iter(
            conditioning.split(
                [layer.modulation.out_features for layer in self._conditioned_layers()], dim=-1
            )
        )
        x = self.patch_embed(hidden_states)  # (B, H/p, W/p, D)
        x = x + resized_position_table(self.position_embed, *x.shape[1:3])

        # Encoder
        skips = []
        for blocks, merging, stage in zip(
            self.encoder, self.mergings, self.architecture.encoder_stages, strict=True
        ):
            x = self._run(blocks, x, vectors, grids[stage.side_divisor])
            skips.append(x)
            x = merging(x)

        # Middle
        if len(self.middle):
            x = x + self._run(
                self.middle, x, vectors, grids[self.architecture.encoder_stages[-1].side_divisor]
            )

        # Decoder
        for blocks, expanding, skip, stage in zip(
            self.decoder, self.expandings, self.skips, self.architecture.decoder_stages, strict=True
        ):
            x = skip(expanding(x), skips.pop())
            x = self._run(blocks, x, vectors, grids[stage.side_divisor])

        sample = self.final_layer(x, next(vectors))  # (B, out_channels, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, blocks: nn.Module, x: Tensor, vectors: Iterator[Tensor], geometry: nn.Module) -> Tensor:
        residual = Residual(x)
        for block in blocks.children():
            if self.gradient_checkpointing and torch.is_grad_enabled():
                assert self._gradient_checkpointing_func is not None
                x = self._gradient_checkpointing_func(
                    self._summed, block, residual.x, next(vectors), geometry
                )
                residual = Residual(x)
            else:
                residual = block(residual, next(vectors), geometry)
        return residual.sum(use_kernels=self._scan_backend.kernels)

    def _summed(self, block: nn.Module, x: Tensor, vectors: Tensor, geometry: nn.Module) -> Tensor:
        """A block as it is checkpointed: what is kept between blocks is x alone."""
        residual: Residual = block(Residual(x), vectors, geometry)
        return residual.sum(use_kernels=self._scan_backend.kernels)

    def _grids(self, height: int, width: int) -> dict[int, nn.Module]:
        divisors = {stage.side_divisor for stage in self.architecture.encoder_stages}
        if _geometry_key(height, width, 1) not in self.geometries:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"token grid: {height} x {width} given; call prepare_grid for it before compiling"
                )
            self.prepare_grid(height, width)
        return {divisor: self.geometries[_geometry_key(height, width, divisor)] for divisor in divisors}

    @torch.no_grad()
    def _initialize_weights(self) -> None:
        """The released code's initial values: xavier linears, zero AdaLN, so that each block starts as the
        identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.embedding.weight, std=0.02)
        nn.init.normal_(self.timestep_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embed.linear_2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, VisualStateSpace):
                module.initialize_weights()
            elif isinstance(module, LaMambaBlock):
                nn.init.zeros_(module.modulation.weight)
                if module.has_attention:
                    nn.init.trunc_normal_(module.attention.relative_position_bias, std=0.02)
        nn.init.zeros_(self.final_layer.modulation.weight)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # diffusers reads the accepted fields off __init__'s signature; here their one home is LaMambaConfig.
        return {field.name for field in dataclasses.fields(LaMambaConfig)} | {"self", "out_channels"}


class FinalLayer(nn.Module):
    """Tokens `(B, H/p, W/p, D)` and AdaLN vectors `(B, 2D)` to `(B, out_channels, H, W)`."""

    def __init__(self, config: LaMambaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.expanding = PatchExpanding(width, width, factor=config.patch_size)
        self.conditioning_proj = nn.Linear(config.conditioning_size, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = ResidualNorm(width, eps=_FINAL_NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, config.out_channels)

    def adaln_vectors(self, c: Tensor) -> Tensor:
        """What `forward` takes of the conditioning vector c `(B, C)`: `(B, 2D)`."""
        return self.modulation(F.silu(self.conditioning_proj(c)))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        shift, scale = vectors.chunk(2, dim=-1)  # (B, D) each
        _, x = self.norm(Residual(self.expanding(x)), shift, scale)
        return self.linear(x).movedim(-1, 1)


def meta_network(config: LaMambaConfig) -> LaMambaDiff:
    """The network in eval mode without memory for its weights: keys, shapes and sizes alone."""
    with torch.device("meta"):
        return LaMambaDiff(**dataclasses.asdict(config)).eval()


def _geometry_key(height: int, width: int, divisor: int) -> str:
    return f"{height}x{width}/{divisor}"
