"""A run's saved state as the folder that the service loads, with a model card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.architecture import Architecture, architecture_from_fields
from model.evaluation.report import figures
from model.messages import one_line
from model.model_folder import local_folder, save_model_folder
from model.network.kinds import new_network
from model.preview import PREVIEW_FILE
from model.training.averages import track_name
from model.training.config import PLACES, TrainConfig
from model.training.snapshots import average_of_length
from model.training.states import SavedState, load_tensors, read_state, state_folders, state_path
from model.whole_file import whole_file

__all__ = ["export_run", "read_metrics"]

logger = logging.getLogger(__name__)


def export_run(
    output_dir: Path,
    target: Path,
    *,
    images_seen: int | None = None,
    weights: str = "ema",
    sigma_rel: float | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> int:
    """Write the model folder `target` from a run's state, by default the newest; its images.

    Args:
        images_seen: which of the kept states, or of the snapshots where `sigma_rel` needs them.
        weights: ema, or network for the weights themselves.
        sigma_rel: the length of a power-function average instead: a track of the run, or any other that its
            snapshots make up.
        metrics: figures for the model card.

    Raises ValueError where the run has no such state, or where `target` is not to be written over.
    """
    _require_own(target)
    of_a_state = images_seen is None or state_path(output_dir / "states", images_seen).is_dir()
    state = _find_state(output_dir, images_seen if of_a_state or sigma_rel is None else None)
    config = TrainConfig.from_dict(state.facts["run"]["config"])
    architecture = architecture_from_fields(state.facts["architecture"])
    if sigma_rel is None:
        kind = {"ema": "ema", "network": "network"}.get(weights)
        if kind is None:
            raise ValueError(f"weights: {weights!r} given; ema or network is accepted")
        values, taken = _saved_weights(state, kind, architecture), state.images_seen
        described = f"moving average, decay {config.ema_decay:g}" if kind == "ema" else "the last step's"
    elif sigma_rel in config.ema_tracks and of_a_state:
        values, taken = _saved_weights(state, track_name(sigma_rel), architecture), state.images_seen
        described = f"power-function average, sigma_rel {sigma_rel:g}"
    else:
        values, taken = average_of_length(output_dir / "snapshots", sigma_rel, images_seen=images_seen)
        described = f"power-function average, sigma_rel {sigma_rel:g}, of snapshots"
    network = new_network(architecture)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(values[name])
    labels = state.facts["labels"]
    save_model_folder(
        target,
        network=network,
        autoencoder=local_folder(config.autoencoder_source),
        labels=labels,
        name=config.name,
        gpu_dtype=config.gpu_dtype,
    )
    previews = output_dir / PREVIEW_FILE
    if previews.is_file():
        shutil.copyfile(previews, target / PREVIEW_FILE)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    kind = f"{type(network).__name__}, {parameters / 1e6:.2f} M parameters"
    card = model_card(config, state, described, images_seen=taken, network=kind, metrics=metrics)
    with whole_file(target / "README.md") as file:
        file.write_text(card, encoding="utf-8")
    logger.info("exported %s after %d images", target, taken)
    return taken


def _require_own(target: Path) -> None:
    """Refuse a file, and a folder with other things than a model, whose README.md would be lost."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"target: {target} given, which is a file; a folder is accepted")
    others = [path.name for path in target.iterdir() if not path.name.startswith(".")]
    if others and "model_index.json" not in others:
        raise ValueError(
            f"target: {target} holds {min(others)} and no model; a new folder, an empty one or a model's is "
            "accepted"
        )


def read_metrics(path: Path) -> dict[str, Any]:
    """Figures for a model card: the metrics of an evaluation.json, or the numbers and texts of another JSON
    object. ValueError for another file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"metrics: {path} cannot be read ({one_line(error)})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"metrics: {path} given; a JSON object is accepted")
    if "metrics" in fields:
        try:
            return dict(figures(fields))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"metrics: {path} has metrics that no evaluation wrote ({type(error).__name__})"
            ) from error
    return {name: value for name, value in fields.items() if isinstance(value, str | int | float)}


def model_card(
    config: TrainConfig,
    state: SavedState,
    weights: str,
    *,
    images_seen: int,
    network: str,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """A card in the hub's format: what the model is, what it saw, and how it was measured."""
    facts = state.facts
    data = f"{config.num_views:,} views of `places`" if config.data == PLACES else f"`{config.data}`"
    labels = facts["labels"]
    kind, article = ("class-conditional", "A") if labels else ("unconditional", "An")
    classes = f", {len(labels)} classes" if labels else ""
    rows = {
        "network": network,
        "weights": weights,
        "data": f"{data}{classes}, digest {facts['run']['data'][:12]}",
        "resolution": f"{config.resolution} px",
        "autoencoder": f"`{config.autoencoder}`, {facts['run']['autoencoder']}",
        "images seen": f"{images_seen:,}",
        "steps": f"{images_seen // config.batch_size:,} of {config.batch_size} images",
        "learning rate": f"{config.learning_rate:g}, {config.learning_rate_schedule}",
        "seed": str(config.seed),
    }
    rows |= {name: str(value) for name, value in (metrics or {}).items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\nlicense: apache-2.0\nlibrary_name: diffusers\ntags: [{kind}]\n---\n"
        f"# {config.name}\n\n{article} {kind} latent diffusion model, trained by `lamamba train`.\n\n"
        f"| | |\n| - | - |\n{table}\n\n"
        "The licence is that of the code; the data and the autoencoder have their own.\n\n"
        f"```json\n{json.dumps(facts['run']['config'], indent=1)}\n```\n"
    )


def _find_state(output_dir: Path, images_seen: int | None) -> SavedState:
    """A whole state of the run: that of `images_seen`, or the newest."""
    folders = state_folders(output_dir / "states")
    if not folders:
        raise ValueError(f"run: {output_dir} given; a run's folder with saved states is accepted")
    if images_seen is None:
        for folder in folders:
            if (state := read_state(folder)) is not None:
                return state
        raise ValueError(f"run: {output_dir} given; none of its states is whole")
    wanted = state_path(output_dir / "states", images_seen)
    if wanted not in folders:
        kept = ", ".join(folder.name.removeprefix("state-").lstrip("0") or "0" for folder in folders)
        raise ValueError(f"images: {images_seen} given; the run has states of {kept} images")
    state = read_state(wanted)
    if state is None:
        raise ValueError(f"images: {images_seen} given; {wanted} is damaged")
    return state


def _saved_weights(state: SavedState, kind: str, architecture: Architecture) -> dict[str, Tensor]:
    with torch.device("meta"):
        network = new_network(architecture)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    tensors = {f"{kind}/{name}": torch.empty(shape) for name, shape in shapes.items()}
    load_tensors(state, tensors)
    return {name: tensors[f"{kind}/{name}"] for name in shapes}
