"""If this fails, the scan that CPUs serve and train with computes another network than the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.network.scan import SCAN_BACKENDS, reference, resolve_scan_backend, vectorized
from model.network.scan.paths import scan_paths
from model.network.scan.vectorized import linear_recurrence

TOLERANCE = {  # relative RMS of the output and of each gradient
    torch.float64: 1e-13,  # another order of the same products
    torch.float32: 2e-6,  # likewise
    torch.bfloat16: 1e-2,  # gradients of bf16 inputs are rounded to bf16
}
NAMES = ("u", "dt", "dt_proj_weight", "A_log", "B", "C", "D", "delta_bias")
CASES = {
    "one-token": {"grid": (1, 1)},
    "two-tokens": {"grid": (1, 2)},
    "odd-length": {"grid": (3, 5), "batch": 2},
    "prime-length": {"grid": (1, 61)},
    "not-square": {"grid": (4, 12), "d_inner": 7},
    "three-states": {"grid": (5, 5), "d_state": 3},
    "sixteen-states": {"grid": (4, 4), "d_state": 16, "batch": 2},
    "plain": {"grid": (6, 3), "vssm": "ss2d"},
    "two-directions": {"grid": (3, 4), "vssm": "vim", "d_state": 2},
    "es2d": {"grid": (4, 6), "vssm": "es2d", "d_state": 2},
    "es2d-one-state": {"grid": (6, 2), "vssm": "es2d"},
}


def scan_inputs(
    *,
    grid: tuple[int, int],
    batch: int = 1,
    d_inner: int = 5,
    rank: int = 3,
    d_state: int = 1,
    vssm: str = "ss2d_continuous",
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], Tensor]:
    """Leaves in the order of NAMES, and the paths."""
    generator = torch.Generator().manual_seed(0)
    paths = scan_paths(vssm, *grid)
    length, directions = grid[0] * grid[1], len(paths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    inputs = [
        normal(batch, length, d_inner).to(dtype),
        normal(batch, length, directions, rank).to(dtype),
        normal(directions, d_inner, rank).to(dtype) * rank**-0.5,
        normal(directions, d_inner, d_state).to(wide),
        normal(batch, length, directions, d_state).to(dtype),
        normal(batch, length, directions, d_state).to(dtype),
        normal(directions, d_inner).to(wide),
        (normal(directions, d_inner) - 1.0).to(wide),
    ]
    return [tensor.requires_grad_() for tensor in inputs], paths


def output_and_gradients(scan: object, inputs: list[Tensor], paths: Tensor) -> list[Tensor]:
    assert callable(scan)
    y = scan(*inputs, paths)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), inputs)]


def assert_close(given: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("y", *NAMES), given, expected, strict=True):
        a, b = a.double(), b.double()
        error = float((a - b).norm() / b.norm().clamp_min(1e-30))
        assert error < tolerance, f"{name}: relative RMS {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_vectorized_scan_and_every_gradient_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    inputs, paths = scan_inputs(**CASES[case], dtype=dtype)  # type: ignore[arg-type]  # a table of keywords
    given = output_and_gradients(vectorized.selective_scan, inputs, paths)
    expected = output_and_gradients(reference.selective_scan, inputs, paths)
    assert_close(given, expected, TOLERANCE[dtype])
    assert given[0].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6], ids=["large", "huge", "underflowing"])
def test_vectorized_scan_is_exact_where_products_of_decays_vanish(scale: float) -> None:
    inputs, paths = scan_inputs(grid=(8, 16), dtype=torch.float32, d_state=2)
    with torch.no_grad():
        inputs[3].add_(math.log(scale))  # A_log
        inputs[7].add_(2.0)  # delta's bias
    given = output_and_gradients(vectorized.selective_scan, inputs, paths)
    expected = output_and_gradients(reference.selective_scan, inputs, paths)
    assert all(tensor.isfinite().all() for tensor in given)
    torch.testing.assert_close(given[0], expected[0], rtol=1e-5, atol=1e-5)
    # The gradient of A vanishes with the decays themselves: equal in what is left of it.
    for a, b in zip(given[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-30)


def test_vectorized_scan_keeps_memory_over_a_long_path() -> None:
    length = 1024
    a, b = torch.full((1, length, 1), 1 - 2.0**-12), torch.zeros(1, length, 1)
    b[0, 0] = 1.0
    h = linear_recurrence(a.double(), b.double())
    torch.testing.assert_close(h[0, -1, 0], torch.tensor((1 - 2.0**-12) ** (length - 1), dtype=torch.float64))


def test_softplus_is_the_identity_above_twenty() -> None:
    u = torch.ones(1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    delta, paths = 21.5 * one, torch.zeros(1, 1, dtype=torch.int64)
    for scan in (reference.selective_scan, vectorized.selective_scan):
        y = scan(u, delta, one[0], 0 * one[0], one, one, torch.zeros(1, 1), torch.zeros(1, 1), paths)
        assert float(y) == 21.5


@pytest.mark.parametrize("name", ["reference", "vectorized"])
def test_inputs_need_not_be_contiguous(name: str) -> None:
    scan = resolve_scan_backend(name).selective_scan
    inputs, paths = scan_inputs(grid=(3, 4), batch=2, d_state=2)
    strided = [tensor.detach().transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    torch.testing.assert_close(scan(*strided, paths), scan(*inputs, paths).detach(), rtol=1e-12, atol=1e-12)


def test_resolve_scan_backend_names_what_it_accepts() -> None:
    assert resolve_scan_backend("auto", "cpu").name == "vectorized"
    assert {"reference", "vectorized"} <= set(SCAN_BACKENDS)
    with pytest.raises(ValueError, match="scan_backend: 'fast' given; auto or one of reference, vectorized"):
        resolve_scan_backend("fast")
