"""State dicts of the authors' released code (yunxiangfu2001/LaMamba-Diff) in terms of ours, both ways.

The architecture is read off their key names and shapes. What those cannot tell comes from the stored
config where there is one: which of the two SS2D scans was trained, and the attention window where the whole
grid fits into it. Every key must find its place; only what follows from the architecture (attention's index
and mask) is dropped, and compared first. Their names live in this file alone; convert.py reads and writes the
files.

Letters: D, R, N, M as in config.py, p the patch size, d a block's width.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import VSSM, LaMambaConfig
from model.network.geometry import GridGeometry
from model.network.lamamba import LaMambaDiff, meta_network

# Ours to theirs, applied in this order.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.(\d+)\.", r"layers.\1.blocks."),
        (r"^decoder\.(\d+)\.", r"layers_up.\1.blocks."),
        (r"^middle\.", r"mid_layer.blocks."),
        (r"^mergings\.(\d+)\.", r"layers.\1.downsample."),
        (r"^expandings\.(\d+)\.", r"layers_up.\1.upsample."),
        (r"^final_layer\.expanding\.", r"final_up."),
        (r"^final_layer\.conditioning_proj\.", r"final_condition_projection."),
        (r"^final_layer\.modulation\.", r"final_adaLN_modulation.1."),
        (r"^final_layer\.linear\.", r"final_linear."),
        (r"^timestep_embed\.linear_1\.", r"t_embedder.mlp.0."),
        (r"^timestep_embed\.linear_2\.", r"t_embedder.mlp.2."),
        (r"^label_embed\.embedding\.", r"y_embedder.embedding_table."),
        (r"^position_embed$", r"pos_embed"),
        (r"(blocks\.\d+)\.conditioning_proj\.", r"\1.condition_projection."),
        (r"(blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation.1."),
        (r"(blocks\.\d+)\.vssm_norm\.", r"\1.norm."),
        (r"(blocks\.\d+)\.attention_norm\.", r"\1.norm_swin."),
        (r"(blocks\.\d+)\.ffn_norm\.", r"\1.norm2."),
        (r"(blocks\.\d+)\.ffn\.0\.", r"\1.mlp.fc1."),
        (r"(blocks\.\d+)\.ffn\.2\.", r"\1.mlp.fc2."),
        (r"(blocks\.\d+)\.attention\.relative_position_bias$", r"\1.attn.relative_position_bias_table"),
        (r"(blocks\.\d+)\.attention\.", r"\1.attn."),
        (r"(blocks\.\d+)\.vssm\.conv\.", r"\1.op.conv2d."),
        (r"(blocks\.\d+)\.vssm\.dt_proj_", r"\1.op.dt_projs_"),
        (r"(blocks\.\d+)\.vssm\.A_log$", r"\1.op.A_logs"),
        (r"(blocks\.\d+)\.vssm\.D$", r"\1.op.Ds"),
        (r"(blocks\.\d+)\.vssm\.", r"\1.op."),
    )
)
_ATTENTION_PARTS = re.compile(r"blocks\.\d+\.(attn\.|norm_swin\.)")
_BLOCK_MODULATION = re.compile(r"blocks\.\d+\.adaLN_modulation\.1\.")
_NUM_STAGES = 4
_AUTOENCODER_FACTOR = 8  # their `args.image_size` is in pixels of an f8 autoencoder
_NAMED_KEYS = 3


def infer_config(
    state_dict: Mapping[str, Tensor],
    *,
    stored_config: object = None,
    stored_args: object = None,
    vssm: VSSM | None = None,
    attention: Literal["shifted_window", "none"] = "shifted_window",
) -> tuple[LaMambaConfig, tuple[str, ...]]:
    """The architecture of the authors' `state_dict`, and one line for each stored value that contradicts it.

    Args:
        stored_config, stored_args: the checkpoint's `config` and `args`, of whatever type; the weights win.
        vssm: the scan; by default what the config says, without one the continuous scan.
        attention: "none" if the weights were trained without the attention term; nothing in them tells.

    Raises ValueError naming the keys that it would have been read from.
    """
    probes = {
        "pos_embed": 4,
        "patch_embed.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "final_linear.bias": 1,
        "layers.0.blocks.0.op.A_logs": 2,
        "layers.0.blocks.0.attn.relative_position_bias_table": 2,
    }
    absent = [key for key in probes if key not in state_dict]
    if absent:
        raise ValueError(f"not LaMamba-Diff weights: {listed('missing', absent)}")
    for key, rank in probes.items():
        if state_dict[key].dim() != rank or not state_dict[key].numel():
            raise ValueError(f"{key}: shape {tuple(state_dict[key].shape)} given; {rank} axes are accepted")
    width, in_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    grid_side = state_dict["pos_embed"].shape[1]
    table_rows, num_heads = state_dict["layers.0.blocks.0.attn.relative_position_bias_table"].shape
    window_size = (math.isqrt(table_rows) + 1) // 2
    depths = tuple(_count_blocks(state_dict, rf"layers\.{i}\.") for i in range(_NUM_STAGES))
    fields: dict[str, Any] = {
        "sample_size": grid_side * patch_size,
        "in_channels": in_channels,
        "learn_sigma": len(state_dict["final_linear.bias"]) == 2 * in_channels,
        "patch_size": patch_size,
        "hidden_size": width,
        "depths": depths,
        "bottleneck_depth": _count_blocks(state_dict, r"mid_layer\."),
        "decoder_extra_block": _count_blocks(state_dict, rf"layers_up\.{_NUM_STAGES - 1}\.") > depths[0],
        "num_classes": len(state_dict["y_embedder.embedding_table.weight"]) - 1,
        "d_state": state_dict["layers.0.blocks.0.op.A_logs"].shape[1],
        "conv_bias": "layers.0.blocks.0.op.conv2d.bias" in state_dict,
        "num_heads": num_heads,
        "window_size": window_size,
        "attention": attention,
    }
    stored = _plain(_plain(_plain(stored_config).get("MODEL")).get("VSSM"))
    stored_window = stored.get("WINDOW_SIZE")
    if window_size == grid_side and isinstance(stored_window, int) and stored_window > window_size:
        fields["window_size"] = stored_window
    continuous = stored.get("CONTINUOUS_SCAN", True)
    fields["vssm"] = vssm or ("ss2d_continuous" if continuous else "ss2d")
    config = LaMambaConfig.from_dict(fields)
    contradictions = tuple(
        f"config.MODEL.VSSM.{field} says {stored[field]!r}; the network is built with {value!r}"
        for field, value in _stored_fields(config).items()
        if field in stored and stored[field] != value
    )
    return config, contradictions + _contradicting_args(_plain(stored_args), config)


def from_authors(
    state_dict: Mapping[str, Tensor], config: LaMambaConfig
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Our state dict for the authors' `state_dict` of architecture `config`, and the keys that were dropped.

    Raises ValueError naming the keys that are missing, left over, of a wrong shape or not finite, and a
    derivable buffer that holds other values than the architecture gives it.
    """
    expected = _authors_shapes(config)
    buffers = _derivable_buffers(config)
    _check_keys(state_dict, expected, buffers)
    own = {}
    for key, target in meta_network(config).state_dict().items():
        theirs = _authors_key(key)
        value = state_dict[theirs]
        if config.attention == "none" and _BLOCK_MODULATION.search(theirs):
            vssm, _, ffn = value.chunk(3)
            value = torch.cat([vssm, ffn])
        own[key] = value.reshape(target.shape)
    used = {_authors_key(key) for key in own}
    return own, tuple(sorted(key for key in state_dict if key not in used))


def to_authors(network: LaMambaDiff) -> dict[str, Tensor]:
    """The authors' state dict of `network` with the buffers that their strict loading asks for, in fp32.

    A network without attention gets attention weights of zero behind gates of zero: they add exactly nothing.
    Raises ValueError where their code has no such network.
    """
    config = _authors_architecture(network.architecture)
    shapes = _authors_shapes(config)
    own = {_authors_key(key): value.detach().cpu().float() for key, value in network.state_dict().items()}
    state_dict = {}
    for key, shape in shapes.items():
        value = own.get(key)
        if value is None:
            value = torch.zeros(shape)
        elif network.architecture.attention == "none" and _BLOCK_MODULATION.search(key):
            vssm, ffn = value.chunk(2)
            value = torch.cat([vssm, torch.zeros_like(vssm), ffn])
        state_dict[key] = value.reshape(shape).clone()
    return state_dict | _derivable_buffers(config)


def _check_keys(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], buffers: Mapping[str, Tensor]
) -> None:
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected and key not in buffers]
    wrong_shape = [
        f"{key} {tuple(state_dict[key].shape)} for {shape}"
        for key, shape in expected.items()
        if key in state_dict and state_dict[key].shape != shape
    ]
    if missing or unexpected or wrong_shape:
        kinds = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong_shape}
        misfits = "; ".join(listed(kind, keys) for kind, keys in kinds.items() if keys)
        raise ValueError(f"the weights do not fit the architecture of their first blocks: {misfits}")
    not_finite = [
        key
        for key in expected
        if not state_dict[key].is_floating_point() or not bool(state_dict[key].isfinite().all())
    ]
    if not_finite:
        raise ValueError(f"the weights hold other values than finite numbers: {listed('in', not_finite)}")
    for key, derived in buffers.items():
        given = state_dict.get(key)
        if given is not None and not torch.equal(given.to(derived.dtype), derived):
            raise ValueError(f"{key}: other values given than windows of this size have")


def _authors_key(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def _authors_shapes(config: LaMambaConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the authors' parameters; their blocks always have attention."""
    network = meta_network(dataclasses.replace(config, attention="shifted_window"))
    shapes = {}
    for key, value in network.state_dict().items():
        shape = tuple(value.shape)
        if key == "patch_embed.proj.weight":
            shape = (shape[0], config.in_channels, config.patch_size, config.patch_size)
        elif key.endswith((".vssm.A_log", ".vssm.D")):
            shape = (shape[0] * shape[1], *shape[2:])
        shapes[_authors_key(key)] = shape
    return shapes


def _derivable_buffers(config: LaMambaConfig) -> dict[str, Tensor]:
    """Attention's index of every block and mask of every shifted one, by the authors' key."""
    coarsest = dataclasses.replace(config.encoder_stages[-1], depth=config.bottleneck_depth)
    levels = [(f"layers.{i}", stage) for i, stage in enumerate(config.encoder_stages)]
    levels += [("mid_layer", coarsest)]
    levels += [(f"layers_up.{i}", stage) for i, stage in enumerate(config.decoder_stages)]
    buffers = {}
    for name, stage in levels:
        side = config.grid_side // stage.side_divisor
        geometry = GridGeometry(
            *(side, side),
            vssm="ss2d",
            scan_window_size=1,
            attention="shifted_window",
            window_size=min(config.window_size, side),
        )
        for index in range(stage.depth):
            buffers[f"{name}.blocks.{index}.attn.relative_position_index"] = geometry.bias_index
            if index % 2 and any(geometry.shift):
                buffers[f"{name}.blocks.{index}.attn_mask"] = geometry.shift_mask.squeeze(1)
    return buffers


def _authors_architecture(config: LaMambaConfig) -> LaMambaConfig:
    """`config` in terms of the authors' code; ValueError if that has no such network."""
    accepted: dict[str, Collection[Any]] = {
        "layout": ("unet",),
        "num_downsamplings": (2,),
        "skip": ("add",),
        "vssm": ("ss2d_continuous", "ss2d"),
        "attention": ("shifted_window", "global", "none"),
        "qk_norm": (False,),
    }
    for field, values in accepted.items():
        value = getattr(config, field)
        if value not in values:
            raise ValueError(
                f"{field}: {value!r} given; the authors' code has {' or '.join(map(str, values))}"
            )
    if config.attention == "global":  # one window that covers the grid
        window_size = max(config.window_size, config.grid_side)
        return dataclasses.replace(config, attention="shifted_window", window_size=window_size)
    if config.attention == "none" and config.hidden_size % config.num_heads:
        return dataclasses.replace(config, attention="shifted_window", num_heads=1)
    return dataclasses.replace(config, attention="shifted_window")


def authors_metadata(config: LaMambaConfig) -> dict[str, Any]:
    """The `args` and `config` of a checkpoint, as plain dicts, as far as they describe the architecture.

    Raises ValueError where the authors' code has no such network.
    """
    config = _authors_architecture(config)
    return {
        "args": {"model": "LaMamba-Diff", "unconditional": config.num_classes == 0} | _stored_args(config),
        "config": {"MODEL": {"VSSM": _stored_fields(config)}},
    }


def _stored_args(config: LaMambaConfig) -> dict[str, Any]:
    """The trainer's arguments of an architecture. (Its `window_size` was never used.)"""
    return {
        "num_heads": [config.num_heads] * _NUM_STAGES,
        "image_size": config.sample_size * _AUTOENCODER_FACTOR,
        "num_classes": config.num_classes,
    }


def _stored_fields(config: LaMambaConfig) -> dict[str, Any]:
    """The authors' `config.MODEL.VSSM` of an architecture."""
    return {
        "CONTINUOUS_SCAN": config.vssm == "ss2d_continuous",
        "PATCH_SIZE": config.patch_size,
        "IN_CHANS": config.in_channels,
        "DEPTHS": list(config.depths),
        "EMBED_DIM": config.hidden_size,
        "SSM_D_STATE": config.d_state,
        "SSM_CONV_BIAS": config.conv_bias,
        "WINDOW_SIZE": config.window_size,
        "SD_UNET_DECODER_DESIGN": config.decoder_extra_block,
        "BOTTLENECK_DEPTH": config.bottleneck_depth,
    }


def _contradicting_args(args: Mapping[str, Any], config: LaMambaConfig) -> tuple[str, ...]:
    truth = _stored_args(config)
    if config.num_classes == 0 and args.get("unconditional"):
        del truth["num_classes"]  # which that trainer ignored
    return tuple(
        f"args.{field} says {args[field]!r}; the network is built with {value!r}"
        for field, value in truth.items()
        if field in args and args[field] != value
    )


def _count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(prefix + r"blocks\.(\d+)\.")
    return len({match[1] for key in state_dict if (match := pattern.match(key))})


def _plain(value: Any) -> Mapping[str, Any]:
    """A stored configuration as a mapping: a dict of any class, a Namespace's fields, or nothing."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def listed(kind: str, keys: Sequence[object]) -> str:
    """ "3 missing (a, b, ...)", so that a thousand keys still make one line."""
    shown = ", ".join(map(str, keys[:_NAMED_KEYS])) + (", ..." if len(keys) > _NAMED_KEYS else "")
    return f"{len(keys)} {kind} ({shown})"
