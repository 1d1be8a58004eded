"""What the card can do at most: a large matrix product and a large copy, on random data.

Both are measured, not read off a data sheet, in the run whose figures are held against them.
"""

from __future__ import annotations

import torch

from model.benchmark.timing import interleaved, milliseconds, percentiles

__all__ = ["measure_ceilings"]

_REPEATS = 20


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`matmul_tflops` of a square product in `dtype`, 2 n^3 operations; `copy_tb_per_s`, read and written.

    On CUDA n is 8192 and the copy is of 2 GiB; elsewhere both are small, to show that the command works.
    """
    cuda = device.type == "cuda"
    n, num_bytes = (8192, 2**31) if cuda else (256, 2**20)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples, failures = interleaved(
        {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)},
        milliseconds(device),
        repeats=_REPEATS,
    )
    if failures:
        raise RuntimeError(f"the device's ceilings could not be measured: {failures}")
    ms = {name: percentiles(values.ms)["ms"] for name, values in samples.items()}
    return {
        "matmul_n": n,
        "matmul_tflops": round(2 * n**3 / (max(ms["matmul"], 1e-4) * 1e9), 3),
        "copy_bytes": num_bytes,
        "copy_tb_per_s": round(2 * num_bytes / (max(ms["copy"], 1e-4) * 1e9), 4),
    }
