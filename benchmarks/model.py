"""How long does one forward of LaMamba-Diff-XL take on this GPU, by scan backend, eager and as a CUDA graph?

Random weights, bf16, 32x32 latents (256 px); every backend first agrees with the first one, then is timed:
warm-up, CUDA events, median with the 20th and 80th percentiles. Needs a CUDA device; about two minutes.

    python benchmarks/model.py --rows 1 16 128
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.environment import RESULTS, write_results
from model.config import LaMambaConfig
from model.messages import one_line
from model.network.lamamba import LaMambaDiff
from model.network.scan import SCAN_BACKENDS, resolve_scan_backend

# bf16 outputs of two backends differ by the order of their sums, over 22 blocks.
AGREEMENT = 2e-2


def build(preset: str, side: int) -> LaMambaDiff:
    """The preset with random weights, modulations included (zeros would make every block the identity)."""
    torch.manual_seed(0)
    config = LaMambaConfig.preset(preset, sample_size=side)
    with torch.device("cuda"):
        net = LaMambaDiff(**dataclasses.asdict(config))
    for name, parameter in net.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    net.to(torch.bfloat16)
    return net.eval().requires_grad_(False)


def inputs(rows: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, 4, side, side, generator=generator, device="cuda", dtype=torch.bfloat16)
    t = torch.randint(1000, (rows,), generator=generator, device="cuda")
    y = torch.randint(1000, (rows,), generator=generator, device="cuda")
    return x, t, y


def captured(run: Callable[[], Tensor]) -> Callable[[], object]:
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def percentiles_ms(run: Callable[[], object], repeats: int) -> dict[str, float]:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"ms": round(median, 3), "ms_p20": round(low, 3), "ms_p80": round(high, 3)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="XL")
    parser.add_argument("--side", type=int, default=32, help="side of the latents")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--backends", nargs="+", default=list(SCAN_BACKENDS), choices=SCAN_BACKENDS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    net = build(arguments.preset, arguments.side)
    results: list[dict[str, Any]] = []
    for rows in arguments.rows:
        x, t, y = inputs(rows, arguments.side)
        expected: Tensor | None = None
        for name in arguments.backends:
            common = {"provider": "lamamba", "preset": arguments.preset, "variant": name, "rows": rows}
            common |= {"side": arguments.side, "numerics": "bf16", "scope": "forward"}
            try:
                net.use_scan_backend(resolve_scan_backend(name, "cuda"))
                run = lambda: net(x, timestep=t, class_labels=y).sample  # noqa: E731, B023
                sample = run().float()
            except (ValueError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
                results.append(common | {"skipped": one_line(error)})
                print(results[-1], flush=True)
                continue
            expected = sample if expected is None else expected
            error_rms = float((sample - expected).norm() / expected.norm())
            if error_rms > AGREEMENT:
                raise SystemExit(f"{name} differs from {arguments.backends[0]} by {error_rms:.2e}")
            repeats = max(3, arguments.repeats // 4) if name == "reference" else arguments.repeats
            modes = (
                ["eager"] if name == "reference" else ["eager", "cuda_graph"]
            )  # 170,000 launches a forward
            for mode in modes:
                figures = percentiles_ms(run if mode == "eager" else captured(run), repeats)
                results.append(common | {"mode": mode, **figures, "relative_rms": round(error_rms, 6)})
                print(results[-1], flush=True)
            torch.cuda.empty_cache()
    print(write_results(f"forward-{arguments.preset.lower()}", results, arguments.output_dir))


if __name__ == "__main__":
    main()
