"""How long does a training step take on this GPU, by compilation mode, launched call by call or as one CUDA
graph?

Each case is a process of its own, so that compile times are cold unless TORCHINDUCTOR_CACHE_DIR is set.
Latents are random: a step does not depend on their values. Wall time a step is measured over steps launched
without waiting in between; host time is what launching them takes, so where the two are equal the step is
bound by the host.

    python benchmarks/training.py --recipes places-256 places-128 --modes block none full --limit-s 240
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import default_model_dir
from model.autoencoder import Autoencoder
from model.benchmark.environment import RESULTS, write_results
from model.data.latents import LatentCache
from model.network.lamamba import LaMambaDiff
from model.network.scan import resolve_scan_backend
from model.recipes import load_recipe
from model.train import Trainer
from model.train_config import TrainConfig

NUM_CLASSES = 21


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["places-256", "places-128"])
    parser.add_argument("--modes", nargs="+", default=["block", "none"], choices=["none", "block", "full"])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the recipe to replace"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit-s", type=float, default=240, help="for one case, compilation included")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, arguments.set, arguments.device, arguments.steps)))
        return
    results: list[dict[str, Any]] = []
    for recipe in arguments.recipes:
        for mode in arguments.modes:
            command = [sys.executable, __file__, "--case", recipe, mode, "--device", arguments.device]
            command += ["--steps", str(arguments.steps), "--set", *arguments.set]
            try:
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=arguments.limit_s)
                rows = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None
                results += rows or [
                    {"recipe": recipe, "compile": mode, "failed": f"exit code {run.returncode}"}
                ]
            except subprocess.TimeoutExpired:
                results.append({"recipe": recipe, "compile": mode, "failed": f"over {arguments.limit_s:g} s"})
            print(json.dumps(results[-2:]), flush=True)
    print(write_results("training", results, arguments.output_dir))


def measure(recipe: str, mode: str, overrides: list[str], device: str, steps: int) -> list[dict[str, Any]]:
    """One row for the step as calls and, on CUDA, one for it as a graph."""
    fields = load_recipe(recipe, ["autoencoder=" + str(default_model_dir(256) / "vae"), *overrides])
    base = TrainConfig.from_dict(fields | {"compile": mode})
    autoencoder = Autoencoder.load(base.autoencoder, device)
    side = base.resolution // autoencoder.downsampling
    moments = torch.randn(4096 if device != "cpu" else 64, 8, side, side, device=device).half()
    data = LatentCache(moments, torch.randint(NUM_CLASSES, (len(moments),), device=device), autoencoder)
    return [
        {"recipe": recipe, "compile": mode, **_row(dataclasses.replace(base, cuda_graph=graph), data, steps)}
        for graph in ([False, True] if device != "cpu" else [False])
    ]


def _row(config: TrainConfig, data: LatentCache, steps: int) -> dict[str, Any]:
    device = data.labels.device
    torch.manual_seed(config.seed)
    architecture = config.network_config(
        num_classes=NUM_CLASSES, downsampling=data.autoencoder.downsampling, in_channels=4
    )
    network = LaMambaDiff(**dataclasses.asdict(architecture)).to(device)  # type: ignore[arg-type]
    network.use_scan_backend(resolve_scan_backend(config.scan_backend, device))
    trainer = Trainer(config, data, network.train())
    started = time.perf_counter()
    losses = [float(trainer.train_step()["loss"])]
    first_step_s = time.perf_counter() - started
    losses += [float(trainer.train_step()["loss"]) for _ in range(4)]
    wall_ms, host_ms = _timed(trainer.train_step, steps, device)
    return {
        "cuda_graph": config.cuda_graph and device.type == "cuda",
        "batch_size": config.batch_size,
        "scan_backend": network.scan_backend,
        "first_step_s": round(first_step_s, 2),
        "wall_ms": round(wall_ms, 3),
        "host_ms": round(host_ms, 3),
        "images_per_second": round(1e3 * config.batch_size / wall_ms, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if device.type == "cuda"
        else None,
        "losses_of_5_steps": [round(loss, 5) for loss in losses],
    }


def _timed(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds a step until all are done, and until the last is launched."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    wait()
    started = time.perf_counter()
    for _ in range(count):
        step()
    launched = time.perf_counter()
    wait()
    return 1e3 * (time.perf_counter() - started) / count, 1e3 * (launched - started) / count


if __name__ == "__main__":
    main()
