"""Training runs in processes of their own, for tests that kill them or that need several ranks.

An entry may ask for trouble: `signal`, of a rank and a number of images after which it gets SIGUSR1; `fault`,
after which it fails, and does not take the step that the others begin; `kill`, in whose place (`step` or
`save`) the process ends without a word. `message` is how many numbers a message of ddp or fsdp has at most.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from model.cuda_graph import CapturedStep
from model.training.config import TrainConfig
from model.training.gradients import _BUCKET_NUMBERS
from model.training.run import train
from model.training.states import StateFolder
from model.training.trainer import Trainer

RUNS_END_S = 240.0


def start_runs(
    folder: Path,
    runs: list[dict[str, Any]],
    world_size: int,
    *,
    device: str = "cpu",
    limit_s: float = RUNS_END_S,
) -> list[int | None]:
    """Call `train` for each of `runs` in so many processes; their exit codes. On `cuda` each has a device.

    What came of a run is in FOLDER/outcome-<number>-<rank>.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["model.training.run"])  # once, and not by each process
    processes = [
        context.Process(target=_run, args=(folder, runs, rank, world_size, device))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(limit_s)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def replays(folder: Path, number: int, rank: int) -> int:
    """How often a run launched graphs on a rank."""
    return int((folder / f"replays-{number}-{rank}").read_text())


def outcome(folder: Path, number: int, rank: int) -> str:
    """What came of a run on a rank."""
    path = folder / f"outcome-{number}-{rank}"
    return path.read_text() if path.exists() else (folder / f"output-{rank}").read_text()


@contextmanager
def _trouble(run: dict[str, Any], rank: int) -> Iterator[None]:
    def after(
        original: Callable[..., Any], trouble: Callable[[], None], images: int
    ) -> Callable[[Trainer], Any]:
        def step(self: Trainer) -> Any:
            result = original(self)
            if self.images_seen == images:
                trouble()
            return result

        return step

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def failing(original: Callable[..., Any], images: int) -> Callable[[Trainer], Any]:
        def step(self: Trainer) -> Any:
            if self.images_seen == images:
                raise RuntimeError("a fault")
            return original(self)

        return step

    with (
        mock.patch.object(Trainer, "train_step", Trainer.train_step),
        mock.patch("model.training.gradients._BUCKET_NUMBERS", run.get("message", _BUCKET_NUMBERS)),
    ):
        if run.get("signal", [None])[0] == rank:
            interrupt = partial(signal.raise_signal, signal.SIGUSR1)
            Trainer.train_step = after(Trainer.train_step, interrupt, run["signal"][1])  # type: ignore[method-assign]
        if run.get("fault", [None])[0] == rank:
            Trainer.train_step = failing(Trainer.train_step, run["fault"][1])  # type: ignore[method-assign]
        if run.get("kill") == "step":
            Trainer.train_step = after(Trainer.train_step, kill, run["images"])  # type: ignore[method-assign]
        publish = StateFolder._publish
        if run.get("kill") == "save":

            def publish_or_die(self: StateFolder, *names: Any) -> None:
                if names[-1]["images_seen"] == run["images"]:
                    kill()
                publish(self, *names)

            with mock.patch.object(StateFolder, "_publish", publish_or_die):
                yield
        else:
            yield


@contextmanager
def _counted_replays(path: Path) -> Iterator[None]:
    """Write how often graphs were launched in the block."""
    numbers = itertools.count()
    launch = CapturedStep.__call__

    def counted(self: CapturedStep[Any]) -> Any:
        next(numbers)
        return launch(self)

    with mock.patch.object(CapturedStep, "__call__", counted):
        yield
    path.write_text(str(next(numbers)))


def _run(folder: Path, runs: list[dict[str, Any]], rank: int, world_size: int, device: str) -> None:
    with (folder / f"output-{rank}").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    for number, run in enumerate(runs):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(run.get("port", 0))}
        with _trouble(run, rank), _counted_replays(folder / f"replays-{number}-{rank}"):
            try:
                result = str(train(TrainConfig.from_dict(run["config"]), device=device))
            except (SystemExit, Exception) as error:
                result = f"{type(error).__name__}: {error}"
        (folder / f"outcome-{number}-{rank}").write_text(result)
