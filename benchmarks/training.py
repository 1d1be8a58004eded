"""How long does a training step take on this GPU, by compilation mode, launched call by call or as one CUDA
graph?

Recipes of the shipped models, or networks with random weights at one size of latents: a preset of ours, and
DiT of a preset's size (`dit-xl-2`, as recipes train it). Both train in the same loop, `Trainer`'s,
with the same loss (eps and the variational bound of the learned variance), fused AdamW and moving average,
bf16 autocast over fp32 weights. Ours is compiled by blocks, as the trainer does it, DiT as a whole, unless
`--modes` says otherwise; the best row of each counts.

Each case is a process of its own, so that compile times are cold unless TORCHINDUCTOR_CACHE_DIR is set. The
graph comes first: its first step compiles, warms up and captures, the first call after it finds all compiled.
A network that does not fit is tried again with half the batch. Latents are random: a step does not depend on
their values. Wall time a step is measured over steps launched without waiting in between; host time is what
launching them takes, so where the two are equal the step is bound by the host.

    python benchmarks/training.py --recipes places-256 places-128 --modes block none full --limit-s 240
    python benchmarks/training.py --networks XL dit-xl-2 B dit-b-2 --batch 128 --steps 15 --limit-s 150
    python benchmarks/training.py --plot benchmarks/results/xl-places-h200.json      # the log of a whole run
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import default_model_dir
from model.architecture import Architecture
from model.autoencoder import Autoencoder
from model.benchmark.config import PRESETS, architecture, dit_architecture
from model.benchmark.environment import RESULTS, write_results
from model.benchmark.forward import peer_name
from model.benchmark.kernels import profile_kernels
from model.benchmark.networks import build_lamamba
from model.benchmark.timing import release
from model.data.latents import LatentCache
from model.messages import one_line
from model.network.kinds import network_macs, new_network
from model.network.scan import resolve_scan_backend
from model.recipes import load_recipe
from model.training.config import TrainConfig
from model.training.network import TrainedNetwork, build_network
from model.training.source import CachedSource
from model.training.trainer import Trainer
from model.training.watch import full_images_per_second
from model.training.world import World
from service.benchmark.plot import finish, pyplot, save

NUM_CLASSES = 21
PROFILED_KERNELS = 40
LEAST_RATIO = 1.4
"""Of images a second of ours to those of DiT of the same size: the goal."""
PEERS = {peer_name(preset): preset for preset in PRESETS}
_RECIPES = ("places-256", "places-128")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipes", nargs="+", default=list(_RECIPES))
    what.add_argument("--networks", nargs="+", choices=[*PRESETS, *PEERS], help="presets of ours, and peers")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=["none", "block", "full"],
        help="default: block and none for recipes; block for networks of ours, full for peers",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the recipe to replace"
    )
    parser.add_argument("--batch", type=int, default=128, help="images of a step of --networks")
    parser.add_argument("--side", type=int, default=32, help="of the latents of --networks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit-s", type=float, default=240, help="for one case, compilation included")
    parser.add_argument("--profile", action="store_true", help="also say which kernels a step's time goes to")
    parser.add_argument("--plot", type=Path, help="only draw the log of a run's file of results")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--case", nargs=3, metavar=("NAME", "MODE", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plot is not None:
        content = json.loads(arguments.plot.read_text(encoding="utf-8"))
        print(plot_log(content, arguments.plot.with_suffix(".png")))
        return
    if arguments.case:
        name, mode, batch = arguments.case
        for row in measure(arguments, name, mode, int(batch)):
            print(json.dumps(row), flush=True)
        return
    rows = []
    for name in arguments.networks or arguments.recipes:
        for mode in arguments.modes or _default_modes(name):
            batch = arguments.batch if arguments.networks else 0
            measured = run_case(name, mode, batch, limit_s=arguments.limit_s)
            rows += measured
            if batch > 1 and did_not_fit(measured):
                rows += run_case(name, mode, batch // 2, limit_s=arguments.limit_s)
    if not arguments.networks:
        print(write_results("training", rows, arguments.output_dir))
        return
    results = {"rows": rows} | comparison(rows)
    for name, best in results["best"].items():
        print(f"{name}: {best['images_per_second']} images/s at batch {best['batch_size']}")
    for name, ratio in results["ratios"].items():
        outcome = "met" if ratio >= LEAST_RATIO else "MISSED"
        print(f"{name}: {ratio} of {peer_name(name)}'s, goal {LEAST_RATIO}: {outcome}")
    print(write_results(f"training-{arguments.networks[0].lower()}", results, arguments.output_dir))


def run_case(name: str, mode: str, batch: int, *, limit_s: float) -> list[dict[str, Any]]:
    """The rows of a case's process, and one that says why where it came to no good end."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", name, mode, str(batch)]
    failed = None
    # A file, not a pipe: the compiler's own processes inherit it, and may outlive the one that is ended.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        try:
            code = process.wait(limit_s)
            failed = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            failed = f"over {limit_s:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        rows = [json.loads(line) for line in output if line.startswith("{")]
    if failed:
        rows.append({"name": name, "compile": mode, "batch_size": batch or None, "failed": failed})
    print(*map(json.dumps, rows), sep="\n", flush=True)
    return rows


def did_not_fit(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a case has no time, for want of memory."""
    return not any("wall_ms" in row for row in rows) and any(row.get("out_of_memory") for row in rows)


def comparison(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best row of each network, and each of ours against DiT of its size, where both are there."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["name"]
        if "wall_ms" not in row:
            continue
        if name not in best or row["images_per_second"] > best[name]["images_per_second"]:
            best[name] = row
    speeds = {name: row["images_per_second"] for name, row in best.items()}
    keys = ("compile", "cuda_graph", "batch_size", "images_per_second", "mfu", "wall_ms", "peak_memory_gib")
    return {
        "best": {name: {key: row[key] for key in keys} for name, row in best.items()},
        "ratios": {
            preset: round(speeds[preset] / speeds[peer], 3)
            for peer, preset in PEERS.items()
            if {peer, preset} <= speeds.keys()
        },
        "goal": LEAST_RATIO,
    }


def plot_log(content: Mapping[str, Any], path: Path) -> Path:
    """Loss and speed of a run over the images seen, its stops marked, to `path` (PNG).

    `content["results"]` has the run's `log`, as log.jsonl has it, and `stops`: `images` and `signal` of each.
    """
    log = content["results"]["log"]
    figure, panels = pyplot().subplots(1, 2, figsize=(10.5, 4.0), layout="constrained")
    images = [line["images"] for line in log]
    for axes, name, title in zip(panels, ("loss", "images_per_second"), ("loss", "images/s"), strict=True):
        axes.plot(images, [line[name] for line in log], color="#c2410c", linewidth=1)
        for stop in content["results"]["stops"]:
            axes.axvline(stop["images"], color="#1d4ed8", linestyle="--", linewidth=1)
            axes.annotate(
                f" {stop['signal']}", (stop["images"], 0.9), xycoords=("data", "axes fraction"), fontsize=8
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        finish(axes)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("{x:g}")
    panels[1].set_ylim(0, 1.2 * max(line["images_per_second"] for line in log))
    return save(figure, content["environment"], path)


def measure(arguments: argparse.Namespace, name: str, mode: str, batch: int) -> Iterator[dict[str, Any]]:
    """On CUDA one row for the step as a graph, then one for it as calls."""
    device = torch.device(arguments.device)
    prepare = _prepared_network if arguments.networks else _prepared_recipe
    config, data, network = prepare(arguments, name, mode, batch)
    source = CachedSource(data, rows=config.batch_size, seed=config.seed)
    trainer = Trainer(dataclasses.replace(config, cuda_graph=True), source, network, World(device=device))
    forms = (True, False) if device.type == "cuda" else (False,)
    for graph in forms:
        facts = {
            "name": name,
            "compile": mode,
            "cuda_graph": graph,
            "batch_size": config.batch_size,
            "scan_backend": getattr(network.module, "scan_backend", None),
            "parameters": sum(parameter.numel() for parameter in network.module.parameters()),
        }
        # One trainer for both forms: weights, moments and average of two would not fit beside activations.
        trainer.capture(graph)
        try:
            facts |= _row(trainer, arguments.steps)
            if arguments.profile:
                profile = profile_kernels(trainer.train_step, device)
                facts["profile"] = profile | {"kernels": profile["kernels"][:PROFILED_KERNELS]}
        except Exception as error:  # out of memory, or whatever a kernel or a compiler fails with
            facts |= {"failed": one_line(error), "out_of_memory": "out of memory" in str(error).lower()}
        yield facts
        trainer.capture(False)
        network.module.zero_grad(set_to_none=True)
        release(device)


def _prepared_recipe(
    arguments: argparse.Namespace, recipe: str, mode: str, batch: int
) -> tuple[TrainConfig, LatentCache, TrainedNetwork]:
    """`batch` is the recipe's own to set."""
    fields = load_recipe(recipe, ["autoencoder=" + str(default_model_dir(256) / "vae"), *arguments.set])
    config = TrainConfig.from_dict(fields | {"compile": mode})
    autoencoder = Autoencoder.load(config.autoencoder, arguments.device)
    data = _random_latents(autoencoder, config.resolution // autoencoder.downsampling, NUM_CLASSES)
    sizes = config.network_config(
        num_classes=NUM_CLASSES, downsampling=autoencoder.downsampling, in_channels=4
    )
    return config, data, build_network(config, sizes, data.labels.device)


def _prepared_network(
    arguments: argparse.Namespace, name: str, mode: Any, batch: int
) -> tuple[TrainConfig, LatentCache, TrainedNetwork]:
    device, side = torch.device(arguments.device), arguments.side
    autoencoder = Autoencoder.load(default_model_dir(256) / "vae", device)
    config = TrainConfig(
        name=name,
        output_dir="runs/benchmark",  # which a step does not write to
        resolution=side * autoencoder.downsampling,
        batch_size=batch,
        compile=mode,
    )
    kind: dict[str, Any] = {"device": device, "dtype": torch.float32, "trainable": True}
    module: nn.Module
    if name in PEERS:
        sizes: Architecture = dit_architecture(PEERS[name], side)
        module = nn.Module.to(new_network(sizes), device).train()
    else:
        sizes = architecture(name, side)
        module = build_lamamba(name, side, d_state=sizes.d_state, **kind)
        module.use_scan_backend(resolve_scan_backend(config.scan_backend, device))
    network = TrainedNetwork(
        module=module,
        null_label=sizes.num_classes,
        label_dropout=0.1,
        macs=lambda: network_macs(sizes),
        build=lambda: copy.deepcopy(module).eval(),
    )
    return config, _random_latents(autoencoder, side, sizes.num_classes), network


def _random_latents(autoencoder: Autoencoder, side: int, num_classes: int) -> LatentCache:
    device = autoencoder.device
    moments = torch.randn(4096 if device.type != "cpu" else 64, 8, side, side, device=device).half()
    return LatentCache(moments, torch.randint(num_classes, (len(moments),), device=device), autoencoder)


def _row(trainer: Trainer, steps: int) -> dict[str, Any]:
    device, batch = trainer.device, trainer.config.batch_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    losses = [float(trainer.train_step().loss)]
    first_step_s = time.perf_counter() - started
    losses += [float(trainer.train_step().loss) for _ in range(4)]
    wall_ms, host_ms = _timed(trainer.train_step, steps, device)
    peak = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
    speed, full_speed = 1e3 * batch / wall_ms, full_images_per_second(trainer.network.macs(), device)
    return {
        "first_step_s": round(first_step_s, 2),
        "steps": steps,
        "wall_ms": round(wall_ms, 3),
        "host_ms": round(host_ms, 3),
        "images_per_second": round(speed, 1),
        "mfu": None if full_speed is None else round(speed / full_speed, 4),
        "peak_memory_gib": None if peak is None else round(peak, 2),
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


def _default_modes(name: str) -> list[str]:
    if name in PEERS:
        return ["full"]
    return ["block"] if name in PRESETS else ["block", "none"]


if __name__ == "__main__":
    main()
