"""Checkpoints of the authors' released code into a model folder, and back.

Their trainer writes `{"model", "ema", "opt", "args", "config"}` by `torch.save`; a bare state dict is taken
too. What a state dict holds and tells about the architecture is authors_format.py's matter; here are files.

Reading never runs code of the file: `weights_only=True`, with `argparse.Namespace` and, as a plain dict, the
configuration class allowed. Writing leaves either the whole result or what was there before.
"""

from __future__ import annotations

import argparse
import collections
import logging
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.authors_format import (
    authors_metadata,
    from_authors,
    infer_config,
    listed,
    to_authors,
)
from model.autoencoder import Autoencoder
from model.class_labels import LABELS_ACCEPTED, read_labels
from model.config import LaMambaConfig
from model.model_folder import (
    load_network,
    read_model_index,
    staged_entries,
    write_model_index,
    write_scheduler,
)
from model.network.lamamba import LaMambaDiff, meta_network
from model.whole_file import whole_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert_checkpoint` found and wrote."""

    config: LaMambaConfig
    weights: str
    """Which weights were taken: "ema", "model" or "state dict"."""
    num_parameters: int
    dropped: tuple[str, ...]
    """The authors' keys that have no counterpart here: derivable buffers, and unused attention parts."""
    warnings: tuple[str, ...]
    written: tuple[str, ...]
    """Entries of the model folder that were written."""
    missing: tuple[str, ...]
    """What the folder still lacks before it can generate."""


def convert_checkpoint(
    checkpoint: Path,
    out_dir: Path,
    *,
    vae: Path | None = None,
    labels: Path | None = None,
    weights: Literal["ema", "model"] | None = None,
    vssm: Literal["ss2d_continuous", "ss2d"] | None = None,
    attention: Literal["shifted_window", "none"] = "shifted_window",
    dtype: torch.dtype = torch.float32,
) -> ConversionReport:
    """Write the authors' `checkpoint` as the model folder `out_dir`.

    Each entry of the folder is written beside its place and moved there whole; other entries stay.

    Args:
        vae: folder of the diffusers AutoencoderKL that the network was trained with, copied.
        labels: class names: JSON (a list, or an object from number to name) or text, one name a line.
            Without it a folder that has a model_index.json keeps it.
        weights: which of the checkpoint's two; by default EMA where there is one.
        vssm: the scan it was trained with; by default what the stored config says, or else "ss2d_continuous".
        attention: "none" for weights trained without the attention term, whose unused parts are then dropped;
            nothing in a checkpoint tells.
        dtype: of the written weights.

    Raises:
        ValueError: one line that names what cannot be read or does not fit. Nothing is written then.
    """
    contents = _read(checkpoint)
    state_dict, taken = _select_weights(checkpoint, contents, weights)
    bare = taken == "state dict"
    try:
        config, warnings = infer_config(
            state_dict,
            stored_config=None if bare else contents.get("config"),
            stored_args=None if bare else contents.get("args"),
            vssm=vssm,
            attention=attention,
        )
        own, dropped = from_authors(state_dict, config)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    for warning in warnings:
        logger.warning("%s: %s", checkpoint, warning)
    names = _class_names(labels, config.num_classes) if labels is not None else ()
    keeps_index = labels is None and (out_dir / "model_index.json").is_file()
    if keeps_index:
        read_model_index(out_dir).labels(config.num_classes)  # refuses an index of another number of classes
    if vae is not None:
        _check_autoencoder(vae, config)

    network = meta_network(config)
    network.load_state_dict({key: value.to(dtype, copy=True) for key, value in own.items()}, assign=True)
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out_dir: {out_dir} given, which is a file; a folder is accepted")
    with staged_entries(out_dir) as staging:
        network.save_pretrained(staging / "transformer", safe_serialization=True)
        write_scheduler(staging)
        if vae is not None:
            shutil.copytree(vae, staging / "vae")
        if not keeps_index:
            write_model_index(staging, labels=names, name=out_dir.resolve().name)
        written = tuple(sorted(entry.name for entry in staging.iterdir()))
    return ConversionReport(
        config=config,
        weights=taken,
        num_parameters=sum(value.numel() for value in own.values()),
        dropped=dropped,
        warnings=warnings,
        written=written,
        missing=() if (out_dir / "vae").is_dir() else ("vae",),
    )


def export_checkpoint(model_dir: Path, out_path: Path) -> None:
    """Write the network of `model_dir` as a checkpoint that the authors' code loads, in fp32.

    `model` and `ema` are both its weights; `args` and `config` are plain dicts; there is no optimizer state.

    Raises:
        ValueError: one line; the folder cannot be read, or their code has no such network.
    """
    network = load_network(model_dir)
    if not isinstance(network, LaMambaDiff):
        raise ValueError(f"{model_dir}: holds a {type(network).__name__}; a LaMambaDiff is accepted")
    state_dict = to_authors(network)
    contents = {"model": state_dict, "ema": state_dict} | authors_metadata(network.architecture)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out_path) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)


def _read(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's top-level dict; no code of the file is run."""
    allowed = [argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode")]
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no such file")
    try:
        archive = zipfile.is_zipfile(checkpoint)
        if archive:
            with zipfile.ZipFile(checkpoint) as file:
                damaged = file.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]  # (class, name) pairs are taken
            contents = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # the readers of a damaged file raise anything
        # Not the reader's own words: torch's advise to load the file with its code.
        raise ValueError(
            f"{checkpoint}: damaged, or it holds more than weights and settings and is refused as unsafe "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(f"{checkpoint}: holds a {type(contents).__name__}; a dict is accepted")
    return contents


def _select_weights(
    checkpoint: Path, contents: dict[str, Any], weights: str | None
) -> tuple[dict[str, Tensor], str]:
    """The state dict to convert, without `module.` prefixes, and which it is."""
    candidates = [name for name in ("ema", "model") if isinstance(contents.get(name), dict)]
    if weights is not None and weights not in candidates:
        raise ValueError(
            f"weights: {weights!r} given; {checkpoint} has {' and '.join(candidates) or 'a bare state dict'}"
        )
    taken = weights or (candidates[0] if candidates else "state dict")
    raw = contents[taken] if candidates else contents
    wrong = [
        str(key) for key, value in raw.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if wrong or not raw:
        raise ValueError(f"{checkpoint}: its {taken} is not a state dict; {listed('not tensors', wrong)}")
    return {key.removeprefix("module."): value for key, value in raw.items()}, taken


def _class_names(path: Path, num_classes: int) -> Sequence[str]:
    names = read_labels(path)
    if isinstance(names, dict):
        keys = [str(i) for i in range(len(names))]
        if set(names) != set(keys):
            raise ValueError(f"labels: {path} has other keys than 0, 1, ...; {LABELS_ACCEPTED}")
        names = [names[key] for key in keys]
    if len(names) != num_classes:
        raise ValueError(f"labels: {len(names)} given; the checkpoint has {num_classes} classes")
    return names


def _check_autoencoder(folder: Path, config: LaMambaConfig) -> None:
    channels = Autoencoder.load(folder).latent_channels
    if channels != config.in_channels:
        raise ValueError(f"vae: {channels} latent channels given; the network has {config.in_channels}")
