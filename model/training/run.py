"""A training run, from its configuration to the exported model: data, steps, saved states, the log.

Progress is counted in images. A run's folder (`output_dir`) holds `config.json` (the resolved configuration),
`states/` (resumable), `log.jsonl`, `tensorboard/`, `samples/`, `snapshots/` of the averages, and at the end
`model/`: the EMA weights as the folder that the service loads. The same command resumes, on as many processes
as it likes. States are saved between steps alone: also on SIGINT, SIGTERM and SIGUSR1, but not after a fault,
which would hide behind the fault of saving.

All that can be refused is refused before a device computes anything.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import signal
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from model.architecture import Architecture, architecture_fields, architecture_from_fields
from model.launched import launched_world_size
from model.messages import one_line
from model.network.kinds import network_parameters
from model.preview import fit_preview_map, write_preview_map
from model.progress import progress_display
from model.stop_request import StopRequest
from model.training.config import TrainConfig
from model.training.data import TrainingData
from model.training.export import export_run
from model.training.network import build_network
from model.training.run_folder import claimed_folder
from model.training.samples import sample_grid
from model.training.snapshots import missing_snapshots, take_back_snapshots, write_snapshot
from model.training.source import Source
from model.training.states import SavedState, StateFolder, load_tensors, newest_state
from model.training.trainer import Trainer
from model.training.watch import Watch, full_images_per_second
from model.training.world import World, whole_tensor
from model.whole_file import write_json

__all__ = ["Diverged", "train"]

logger = logging.getLogger(__name__)

_PREVIEW_VIEWS = 64  # that the preview map is fitted to: 16,384 latent pixels at 128 px, for 15 unknowns


class Diverged(RuntimeError):
    """A run whose gradients stay non-finite, whatever it goes back to; one line for people."""


def train(config: TrainConfig, *, device: torch.device | str | None = None) -> Path | None:
    """Run, or go on with, the run of `config`; the exported model folder, or None when `stop_after_s` came
    first.

    SIGINT, SIGTERM or SIGUSR1 during the training steps, to any of the processes, ends the program after the
    step: with a saved state, and with exit code 128 + the signal's number. Before the first step, where there
    is nothing to save, and where a second SIGINT comes, it ends at once.

    Raises ValueError for what cannot be run, Diverged for a run without finite gradients.
    """
    deadline = time.monotonic() + config.stop_after_s
    config.rank_batch_size(launched_world_size())
    _require_installed(config)
    _require_useful_tracks(config)
    with StopRequest(at_once=True) as stop, warnings.catch_warnings():
        # What torch.distributed.checkpoint says of a run of one process, which is one on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # Nobody changes the network's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        with World.joined(config.parallel, device=device, rank_timeout_s=config.rank_timeout_s) as world:
            data = TrainingData.open(config, world.device)
            architecture = config.network_config(
                num_classes=len(data.labels),
                downsampling=data.downsampling,
                in_channels=data.latent_channels,
            )
            with (
                claimed_folder(Path(config.output_dir), world),
                progress_display(shown=world.is_main) as progress,
            ):
                try:
                    run = _Run(config, data, architecture, world, progress)
                    return run.whole(stop, deadline=deadline)
                except torch.OutOfMemoryError as error:
                    reason = _no_memory(config, world, error)
                    _tell_alone(reason, world)
                    raise ValueError(reason) from error


class _Run:
    """What belongs to one process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        architecture: Architecture,
        world: World,
        progress: Progress,
    ) -> None:
        self.config, self.data, self.world, self.progress = config, data, world, progress
        self.output_dir = Path(config.output_dir)
        run = {
            "config": config.to_dict(),
            "autoencoder": data.autoencoder_fingerprint,
            "data": data.digest,
        }
        self.facts: dict[str, Any] = {
            "run": run,
            "architecture": architecture_fields(architecture),
            "labels": list(data.labels) if architecture.num_classes else [],
        }
        self.states = StateFolder(
            self.output_dir / "states",
            world,
            keep=config.keep_states,
            keep_every=config.keep_state_every,
            asynchronous=config.async_save,
        )
        _require_room(config, architecture, world, self.states)
        state = newest_state(self.states.folder, world)
        if state is not None:
            _require_same_run(config, self.facts, state.facts)
        network = build_network(config, architecture, world.device)
        self.source: Source = data.source(world, progress)
        parameters = sum(parameter.numel() for parameter in network.module.parameters())
        logger.info(
            "%s: %.2f M parameters, scan %s, %s, %d x %s",
            config.name,
            parameters / 1e6,
            network.module.scan_backend,
            world.parallel,
            world.size,
            world.device.type,
        )
        self.trainer = Trainer(config, self.source, network, world)
        self.watch: Watch | None = None
        self.rollbacks = 0
        if state is not None:
            self._go_on_from(state, images_seen=state.images_seen)
            self.rollbacks = state.facts.get("rollbacks", 0)  # states of earlier versions do not say
            logger.info("resuming from %s", state.folder)

    def whole(self, stop: StopRequest, *, deadline: float) -> Path | None:
        """Train to the end; the exported folder, or None when the deadline came first."""
        config, trainer, world = self.config, self.trainer, self.world
        try:
            if world.is_main:
                write_json(self.output_dir / "config.json", self.facts["run"]["config"])
                self._write_previews()
            if trainer.images_seen < config.num_images:
                started = time.monotonic()
                trainer.prepare()
                world.barrier()  # a rank that compiles what others found in a cache is minutes behind
                logger.info("ready to train after %.0f s", time.monotonic() - started)
            if world.is_main:
                take_back_snapshots(self.output_dir / "snapshots", trainer.images_seen)
                self.watch = Watch(
                    config,
                    self.progress,
                    images_seen=trainer.images_seen,
                    full_speed=full_images_per_second(trainer.network.macs(), world.device, world.size),
                    device=world.device,
                )
            stop.at_once = False
            if not self._steps(stop, deadline):
                return None
            self.states.finish()
        except ValueError as error:
            _tell_alone(error, world)
            raise
        finally:
            trainer.capture(False)
            self.source.close()
            if self.watch is not None:
                self.watch.close()
        if world.is_main:
            export_run(self.output_dir, self.output_dir / "model")
        world.barrier()
        return self.output_dir / "model"

    def _steps(self, stop: StopRequest, deadline: float) -> bool:
        """Train to `num_images`; False when the deadline came first."""
        config, trainer, world = self.config, self.trainer, self.world
        saved_at, healthy = time.monotonic(), True
        while trainer.images_seen < config.num_images:
            trainer.train_step()
            finished = trainer.images_seen >= config.num_images
            if trainer.step % config.log_every == 0 or finished:
                self._record()
                healthy = self._roll_back_if_needed()
            if self._is_due(config.snapshot_every) or (finished and config.snapshot_every):
                self._write_snapshot()
            if self._is_due(config.sample_every):
                self._draw_samples()
            self.states.poll()
            now = time.monotonic()
            received, late, due = world.largest_of_each(
                [stop.received or 0, now > deadline, now - saved_at > config.state_every_s]
            )
            if finished or received or late or (due and healthy):
                self._save()
                saved_at = time.monotonic()
            if received:
                self.states.finish()
                logger.info(
                    "%s: stopped after %d images; the same command goes on",
                    signal.Signals(received).name,
                    trainer.images_seen,
                )
                raise SystemExit(128 + received)
            if late and not finished:
                self.states.finish()
                return False
        return True

    def _is_due(self, every: int) -> bool:
        """Whether the last step passed a multiple of so many images; 0 never does."""
        seen = self.trainer.images_seen
        return bool(every) and seen // every > (seen - self.config.batch_size) // every

    def _record(self) -> None:
        """Tell the means over the ranks since the last record; waits for the device."""
        trainer = self.trainer
        count, *sums = self.world.mean(trainer.window).tolist()
        trainer.window.zero_()
        means = [value / count if count else math.nan for value in sums]
        if self.watch is not None:
            values = dict(zip(("loss", "mse", "vb", "grad_norm"), means, strict=True))
            skipped = int(trainer.optimizer.skipped_steps)
            self.watch.record(trainer.images_seen, values, skipped_steps=skipped)

    def _roll_back_if_needed(self) -> bool:
        """Whether the last step had finite gradients. After too many without, take back the newest state.

        The weights, not the position: the same samples would lead to the same end.
        """
        in_a_row = int(self.trainer.optimizer.skipped_in_a_row)
        if in_a_row < self.config.rollback_after_steps:
            return in_a_row == 0
        images = self.trainer.images_seen
        what = f"{in_a_row} steps in a row without finite gradients, up to image {images}"
        self.states.finish()
        state = newest_state(self.states.folder, self.world, healthy=True)
        if state is None or self.rollbacks >= self.config.max_rollbacks:
            reason = (
                "there is no saved state yet" if state is None else f"{self.rollbacks} rollbacks did not help"
            )
            raise Diverged(
                f"{what}, and {reason}. Try a lower learning_rate, max_grad_norm=1.0 or network.qk_norm=true"
            )
        self.rollbacks += 1
        self._go_on_from(state, images_seen=images)
        logger.warning(
            "%s: going on with new samples from the weights after %d images, rollback %d of at most %d",
            what,
            state.images_seen,
            self.rollbacks,
            self.config.max_rollbacks,
        )
        return False

    def _go_on_from(self, state: SavedState, *, images_seen: int) -> None:
        load_tensors(state, self.trainer.tensors(), self.world)
        self.trainer.go_on_from(images_seen)

    def _save(self) -> None:
        trainer = self.trainer
        healthy = int(trainer.optimizer.skipped_in_a_row) == 0
        facts = self.facts | {"rollbacks": self.rollbacks}
        self.states.save(trainer.images_seen, trainer.tensors(), facts, healthy=healthy)

    def _write_snapshot(self) -> None:
        trainer = self.trainer
        tensors = trainer.tensors()
        tracks = {
            sigma_rel: {name: whole_tensor(tensors[f"{track.name}/{name}"]) for name in trainer.parameters}
            for sigma_rel, track in zip(self.config.ema_tracks, trainer.tracks, strict=True)
        }
        if self.world.is_main and tracks:
            write_snapshot(self.output_dir / "snapshots", trainer.images_seen, tracks)

    def _draw_samples(self) -> None:
        with nullcontext() if self.watch is None else self.watch.paused():
            weights = {name: whole_tensor(average) for name, average in self.trainer.ema.items()}
            if self.watch is not None:
                pixels = sample_grid(
                    self.trainer.network.with_weights(weights),
                    self.source.autoencoder,
                    self.data.labels,
                    device=self.world.device,
                    gpu_dtype=self.config.gpu_dtype,
                )
                self.watch.picture(self.trainer.images_seen, pixels)
        self.world.barrier()

    def _write_previews(self) -> None:
        """The map for pictures of unfinished images: it is the autoencoder's, whatever the network learns."""
        self.source.prepare(0)
        moments, _ = self.source.rows(slice(0, _PREVIEW_VIEWS))
        latents = self.source.autoencoder.latents(moments)  # (n, C, h, w)
        write_preview_map(
            self.output_dir, fit_preview_map(latents, self.source.autoencoder.decode(latents))[0]
        )


def _require_same_run(config: TrainConfig, facts: dict[str, Any], saved: dict[str, Any]) -> None:
    """ValueError unless a run of `facts` may go on from a state of `saved`; what it changes is logged.

    Data, autoencoder and network are what they hold, wherever they lie and however they are spelled.
    """
    run, earlier = facts["run"], saved["run"]
    changes = config.changes_since(earlier["config"])
    if run["autoencoder"] != earlier["autoencoder"]:
        raise ValueError(
            f"autoencoder: {config.autoencoder} with weights {run['autoencoder']} given; the run in "
            f"{config.output_dir} learns the latents of {earlier['config']['autoencoder']} with weights "
            f"{earlier['autoencoder']}, continue with those or choose another output_dir"
        )
    if run["data"] != earlier["data"]:
        raise ValueError(
            f"data: {config.data} with digest {run['data'][:12]} given; the run in {config.output_dir} was "
            f"started on {earlier['data'][:12]}, continue with that or choose another output_dir"
        )
    before = architecture_fields(architecture_from_fields(saved["architecture"]))
    for name, now in facts["architecture"].items():
        if before.get(name) != now:
            raise ValueError(
                f"network.{name}: {now!r} given; the run in {config.output_dir} was started with "
                f"{before.get(name)!r}, continue with that or choose another output_dir"
            )
    for name, (earlier_value, value) in changes.items():
        logger.info("%s: %r from here on, %r before", name, value, earlier_value)


def _require_installed(config: TrainConfig) -> None:
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: not installed; pip install 'lamamba[wandb]', or leave the field out")


def _tell_alone(reason: object, world: World) -> None:
    """Log what may be this rank's alone: commands print the line of the main rank."""
    if not world.is_main:
        logger.error("rank %d of %d: %s", world.rank, world.size, reason)


def _no_memory(config: TrainConfig, world: World, error: torch.OutOfMemoryError) -> str:
    rows = config.rank_batch_size(world.size)
    or_else = "" if config.activation_checkpointing else ", or as many with activation_checkpointing=true"
    return (
        f"micro_batch_size: {min(config.micro_batch_size or rows, rows)} given; {world.device} has no memory "
        f"for that, and fewer may fit{or_else} ({one_line(error)})"
    )


def _require_useful_tracks(config: TrainConfig) -> None:
    """ValueError for tracks that would still be the first weights where they are read, and for snapshots of
    none.
    """
    if config.snapshot_every and not config.ema_tracks:
        raise ValueError(
            f"snapshot_every: {config.snapshot_every} given without ema_tracks, of which snapshots are; 0 is "
            "accepted, or with a list of ema_tracks"
        )
    first = config.ema_track_interval * config.batch_size
    for name in ("num_images", "snapshot_every"):
        images = getattr(config, name)
        if config.ema_tracks and 0 < images < first:
            raise ValueError(
                f"{name}: {images} given; with ema_tracks at least {first}, the images of their first update "
                "(ema_track_interval steps), is accepted"
            )


def _require_room(config: TrainConfig, architecture: Architecture, world: World, states: StateFolder) -> None:
    """ValueError where disk or memory cannot hold the run's state, whatever else it needs."""
    parameters = network_parameters(architecture)
    state_bytes = 4 * parameters * (4 + len(config.ema_tracks))  # weights, two moments, EMA
    snapshots = missing_snapshots(
        Path(config.output_dir) / "snapshots", config.num_images, every=config.snapshot_every
    )
    snapshot_bytes = 2 * parameters * len(config.ema_tracks)
    needed = states.bytes_to_save(state_bytes) + snapshots * snapshot_bytes
    free = shutil.disk_usage(config.output_dir).free
    if free < needed:
        also = f", and for {snapshots} snapshots of {snapshot_bytes / 2**30:.1f} GiB" if snapshots else ""
        raise ValueError(
            f"output_dir: {config.output_dir} has {free / 2**30:.1f} GiB free; {needed / 2**30:.1f} GiB are "
            f"needed for {config.keep_states} states of {state_bytes / 2**30:.1f} GiB, and one more while it "
            f"is written{also}"
        )
    shards = world.size if world.parallel == "fsdp" else 1
    needed = (state_bytes + 4 * parameters) // shards  # with the gradients
    if world.device.type == "cuda":
        there = torch.cuda.mem_get_info(world.device)[1]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if there < needed:
        raise ValueError(
            f"network: {parameters / 1e6:.0f} M parameters given; weights, gradients, moments and averages "
            f"take {needed / 2**30:.1f} GiB, {world.device} has {there / 2**30:.1f}: parallel=fsdp on more "
            "devices shares them"
        )
