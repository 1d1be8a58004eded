"""How fast and how large is LaMamba on a CPU: an image, a server's start, and the scan backends?

    images   seconds an image in process (guided, DPM-Solver++, 20 steps), by model, denoise and decode apart
    server   process start to ready, resident memory, the first image by HTTP; what importing alone costs
    scan     vectorized against reference at L = 1024, d_inner = 96: equal first, then timed

Medians with the 20th and 80th percentiles; the load of the machine before the start is in the results, and
on a loaded machine all times are upper bounds. About two minutes on two cores.

    python benchmarks/cpu.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import RESULTS, write_results
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.network.scan import ScanBackend, resolve_scan_backend
from model.network.scan.paths import scan_paths
from model.pipeline import LaMambaPipeline
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir
from service.benchmark.server import running_server

STEPS = 20
SCAN_SIDE, SCAN_WIDTH, SCAN_RANK = 32, 96, 3
AGREEMENT = 1e-5  # relative RMS of outputs and gradients, fp32
GOALS: dict[str, tuple[str, float]] = {
    "image_128_s": ("<=", 0.8),
    "image_256_s": ("<=", 3.0),
    "ready_s": ("<=", 10.0),
    "rss_bytes": ("<=", 1e9),
    "scan_ratio": (">=", 5.0),
}

_IMPORTS = """
import time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
import diffusers
diffusers_s = time.perf_counter() - start - torch_s
import service.server, model.pipeline
print(torch_s, diffusers_s, time.perf_counter() - start - torch_s - diffusers_s)
"""


def percentiles(seconds: Sequence[float], name: str = "s") -> dict[str, float]:
    low, median, high = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {name: round(median, 4), f"{name}_p20": round(low, 4), f"{name}_p80": round(high, 4)}


def time_images(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of one guided image, alone in its batch."""
    pipeline = LaMambaPipeline.load(folder, device="cpu", num_row_threads=available_cpu_threads())
    denoise: list[float] = []
    decode: list[float] = []
    for index in range(repeats + 1):
        step_ends: list[float] = []
        start = time.perf_counter()
        pipeline.generate(
            [0],
            seeds=[index],
            guidance_scale=2.5,
            num_inference_steps=STEPS,
            sampler="dpm++",
            progress=lambda _: step_ends.append(time.perf_counter()),  # noqa: B023  # called within the loop
        )
        end = time.perf_counter()
        if index:  # the first one warms up
            denoise.append(step_ends[-1] - start)
            decode.append(end - step_ends[-1])
    return {
        "model": pipeline.name,
        "resolution": pipeline.resolution,
        "parameters": sum(parameter.numel() for parameter in pipeline.network.parameters()),
        "scan_backend": pipeline.scan_backend,
        "sampler": "dpm++",
        "steps": STEPS,
        "cfg_scale": 2.5,
        **percentiles([a + b for a, b in zip(denoise, decode, strict=True)]),
        **percentiles(denoise, "denoise_s"),
        **percentiles(decode, "decode_s"),
    }


def time_server(folders: Sequence[Path]) -> dict[str, Any]:
    """A server's start, memory and first answers."""
    root = Path(__file__).resolve().parent.parent
    output = subprocess.run([sys.executable, "-c", _IMPORTS], cwd=root, capture_output=True, check=True)
    torch_s, diffusers_s, own_s = map(float, output.stdout.split())
    with running_server(folders) as server, httpx.Client(timeout=60.0, trust_env=False) as client:
        at_ready = server.memory_bytes()
        listed = client.get(f"{server.url}/v1/models").json()["data"]
        resolutions = [model["resolution"] for model in listed]
        latencies = {}
        for attempt in ("first", "second"):
            for resolution in resolutions:
                body = {"class_id": 0, "resolution": resolution, "seed": 0, "steps": STEPS, "cfg_scale": 2.5}
                start = time.perf_counter()
                answer = client.post(
                    f"{server.url}/generate", json=body, headers={"accept": "image/png"}
                ).raise_for_status()
                latencies[f"{attempt}_{resolution}_s"] = round(time.perf_counter() - start, 3)
                assert answer.content.startswith(b"\x89PNG")
        for resolution in resolutions:
            body = {"class_id": 0, "resolution": resolution, "num_images": 8, "steps": 4}
            client.post(f"{server.url}/generate", json=body).raise_for_status()
        after = server.memory_bytes()
    return {
        "models": [model["id"] for model in listed],
        "live_s": round(server.live_s, 2),
        "ready_s": round(server.ready_s, 2),
        "import_s": {
            "torch": round(torch_s, 2),
            "diffusers": round(diffusers_s, 2),
            "rest": round(own_s, 2),
        },
        "rss_at_ready_bytes": at_ready["rss_bytes"],
        "rss_bytes": after["rss_bytes"],
        "peak_rss_bytes": after["peak_rss_bytes"],
        "http_latency": latencies,
    }


def scan_arguments(d_state: int) -> list[Tensor]:
    """u, dt, dt_proj_weight, A, B, C, D, delta_bias and the paths."""
    generator = torch.Generator().manual_seed(d_state)
    paths = scan_paths("ss2d_continuous", SCAN_SIDE, SCAN_SIDE)
    length, directions = SCAN_SIDE**2, len(paths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [
        normal(1, length, SCAN_WIDTH),
        normal(1, length, directions, SCAN_RANK),
        normal(directions, SCAN_WIDTH, SCAN_RANK) * SCAN_RANK**-0.5,
        normal(directions, SCAN_WIDTH, d_state),
        normal(1, length, directions, d_state),
        normal(1, length, directions, d_state),
        normal(directions, SCAN_WIDTH),
        normal(directions, SCAN_WIDTH) - 4.0,
    ]
    return [*(tensor.requires_grad_() for tensor in inputs), paths]


@torch.inference_mode()
def forward(backend: ScanBackend, arguments: Sequence[Tensor]) -> Tensor:
    return backend.selective_scan(*arguments)


def forward_backward(backend: ScanBackend, arguments: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradient of the sum of its squares by each argument but the paths."""
    y = backend.selective_scan(*arguments).sum(2)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), arguments[:-1])]


def time_scans(repeats: int) -> list[dict[str, Any]]:
    """Both backends, forward and with backward; the ratio is that of the medians."""
    results: list[dict[str, Any]] = []
    backends = [resolve_scan_backend(name) for name in ("reference", "vectorized")]
    for d_state in (1, 16):
        arguments = scan_arguments(d_state)
        outputs = [forward_backward(backend, arguments) for backend in backends]
        error = max(float((a - b).norm() / a.norm()) for a, b in zip(outputs[0], outputs[1], strict=True))
        if error > AGREEMENT:
            raise SystemExit(f"vectorized differs from reference by {error:.1e} at d_state {d_state}")
        for scope in ("forward", "forward_backward"):
            row: dict[str, Any] = {"d_state": d_state, "scope": scope, "relative_rms": error}
            for backend in backends:
                run = partial(forward if scope == "forward" else forward_backward, backend, arguments)
                times = timed(run, max(2, repeats // 2) if backend.name == "reference" else 4 * repeats)
                row |= percentiles([1000 * seconds for seconds in times], f"{backend.name}_ms")
            row["ratio"] = round(row["reference_ms"] / row["vectorized_ms"], 1)
            results.append(row)
    return results


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def against_goals(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal beside what was measured."""
    measured = {f"image_{image['resolution']}_s": image["s"] for image in results["images"]}
    measured |= {name: results["server"][name] for name in ("ready_s", "rss_bytes")}
    measured["scan_ratio"] = min(row["ratio"] for row in results["scan"])
    return {
        name: {
            "goal": f"{relation} {bound:g}",
            "measured": measured[name],
            "met": measured[name] <= bound if relation == "<=" else measured[name] >= bound,
        }
        for name, (relation, bound) in GOALS.items()
        if name in measured
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", help="model folders; default: the shipped ones")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folders = arguments.models or [default_model_dir(resolution) for resolution in PRETRAINED_RESOLUTIONS]

    load = os.getloadavg()[0]
    prepare_process()  # as `lamamba` does
    results: dict[str, Any] = {"row_threads": available_cpu_threads(), "load_average_before": round(load, 2)}
    results["images"] = [time_images(folder, arguments.repeats) for folder in folders]
    results["scan"] = time_scans(arguments.repeats)
    results["server"] = time_server(folders)
    results["goals"] = against_goals(results)

    for image in results["images"]:
        print(
            f"{image['model']:12} {image['s']:.2f} s an image "
            f"(denoise {image['denoise_s']:.2f}, decode {image['decode_s']:.2f})"
        )
    for row in results["scan"]:
        print(
            f"scan, N={row['d_state']:<2} {row['scope']:16} vectorized {row['vectorized_ms']:.1f} ms, "
            f"reference {row['reference_ms']:.0f} ms: {row['ratio']:.0f}x"
        )
    server = results["server"]
    print(
        f"server       ready {server['ready_s']:.1f} s, RSS {server['rss_at_ready_bytes'] / 1e6:.0f} MB at "
        f"ready, {server['rss_bytes'] / 1e6:.0f} MB after images"
    )
    for name, goal in results["goals"].items():
        print(f"{'met' if goal['met'] else 'MISSED':6} {name} {goal['goal']}: {goal['measured']:g}")
    print(write_results("cpu", results, arguments.output_dir))


if __name__ == "__main__":
    main()
