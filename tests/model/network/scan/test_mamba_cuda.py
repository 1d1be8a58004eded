"""mamba-ssm's kernels behind the scan's signature: the gather by path, the groups, and every gradient.

If these fail, this backend puts outputs at wrong tokens or trains on wrong gradients. Without a GPU a loop
stands in for the kernels, with their layout and their rules; the `gpu` tests run the kernels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.scan import mamba_cuda, reference
from model.network.scan.paths import scan_paths

NAMES = ("u", "dt", "dt_proj_weight", "A_log", "B", "C", "D", "delta_bias")
TOLERANCE = {  # relative RMS of y and of each gradient
    torch.float32: 2e-5,  # the kernels' fast exponentials, and sums in any order
    torch.bfloat16: 1e-2,  # y, du, ddelta of each direction, dB, dC and the kernels' dy are rounded to 2**-9
}
STAND_IN_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

CASES = {
    "one_token": {"grid": (1, 1), "d_inner": 1},
    "not_square": {"grid": (3, 7), "batch": 3, "d_inner": 10},
    "three_states": {"grid": (4, 4), "d_state": 3},
    "es2d": {"grid": (4, 6), "batch": 2, "vssm": "es2d"},
    "two_directions": {"grid": (3, 3), "vssm": "vim"},
}
GPU_CASES = {
    **CASES,
    "stage_1": {"grid": (32, 32), "d_inner": 96, "batch": 32},
    "stage_3": {"grid": (8, 8), "d_inner": 384, "batch": 32},
    "sixteen_states": {"grid": (16, 16), "d_inner": 130, "d_state": 16},
    "two_chunks": {"grid": (48, 66), "d_inner": 40},
    "es2d_large": {"grid": (32, 32), "d_inner": 96, "vssm": "es2d"},
}


def scan_inputs(
    *,
    grid: tuple[int, int],
    d_inner: int = 8,
    batch: int = 1,
    d_state: int = 1,
    rank: int = 3,
    vssm: str = "ss2d_continuous",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """Leaves in the order of NAMES, and the paths."""
    generator = torch.Generator().manual_seed(0)
    paths = scan_paths(vssm, *grid)
    length, directions = grid[0] * grid[1], len(paths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    inputs = [
        normal(batch, length, d_inner).to(dtype),
        normal(batch, length, directions, rank).to(dtype),
        normal(directions, d_inner, rank).to(dtype) * rank**-0.5,
        normal(directions, d_inner, d_state),
        normal(batch, length, directions, d_state).to(dtype),
        normal(batch, length, directions, d_state).to(dtype),
        normal(directions, d_inner),
        normal(directions, d_inner) - 2.0,
    ]
    return [tensor.requires_grad_() for tensor in inputs], paths.to(device)


def grouped_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The kernels' forward: u, delta `(batch, dim, length)`, B, C `(batch, groups, d_state, length)`."""
    dt = F.softplus(delta.float() + delta_bias.unsqueeze(1))
    B, C = (t.float().repeat_interleave(len(A) // t.shape[1], dim=1) for t in (B, C))
    h = A.new_zeros(len(u), *A.shape)
    outputs = []
    for i in range(u.shape[2]):
        driven = (dt[:, :, i] * u[:, :, i].float()).unsqueeze(-1) * B[..., i]
        h = torch.exp(dt[:, :, i].unsqueeze(-1) * A) * h + driven
        outputs.append((h * C[..., i]).sum(-1) + D * u[:, :, i].float())
    return torch.stack(outputs, dim=2).to(u.dtype)


def check_rules(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> None:
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == bias.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (u, delta, A, B, C, D, bias))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`grouped_scan` and its gradient as the extension, with its arguments and results."""

    def fwd(*arguments: Any) -> list[Tensor]:
        *inputs, z, delta_bias, softplus = arguments
        assert z is None
        assert softplus
        check_rules(*inputs, delta_bias)
        u, A = inputs[0], inputs[2]
        chunks = -(-u.shape[2] // 2048)
        return [grouped_scan(*inputs, delta_bias), A.new_zeros(*u.shape[:2], chunks, 2 * A.shape[1])]

    def bwd(*arguments: Any) -> list[Tensor]:
        *inputs, z, delta_bias, dy, states, out, dz, softplus, recompute = arguments
        assert (z, out, dz, softplus, recompute) == (None, None, None, True, False)
        check_rules(*inputs, delta_bias)
        assert dy.dtype == inputs[0].dtype
        assert dy.is_contiguous()
        assert states.shape[3] == 2 * inputs[2].shape[1]

        def gradients() -> list[Tensor]:
            leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, delta_bias)]
            return list(torch.autograd.grad(grouped_scan(*leaves), leaves, dy))

        # An operator runs below autograd; another thread does not.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(gradients).result()

    monkeypatch.setattr(mamba_cuda, "_extension", lambda: SimpleNamespace(fwd=fwd, bwd=bwd))


def relative_rms(value: Tensor, expected: Tensor) -> float:
    """The error's norm over the expected norm; the error's own where zero is expected."""
    assert value.shape == expected.shape
    error = (value.double() - expected).norm()
    return (error / expected.norm() if expected.norm() > 0 else error).item()


def assert_matches_reference(inputs: list[Tensor], paths: Tensor, scan: Any, tolerance: float) -> None:
    y = scan(*inputs, paths)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    gradients = torch.autograd.grad(y, inputs, grad_y)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = reference.selective_scan(*exact_inputs, paths)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad_y.double())
    assert y.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in inputs]
    errors = {"y": relative_rms(y, exact)}
    for name, gradient, expected in zip(NAMES, gradients, exact_gradients, strict=True):
        errors[name] = relative_rms(gradient, expected)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_selective_scan_matches_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, paths = scan_inputs(**case, dtype=dtype)
    assert_matches_reference(inputs, paths, mamba_cuda.selective_scan, STAND_IN_TOLERANCE[dtype])


@pytest.mark.usefixtures("stand_in")
def test_selective_scan_without_gradients_is_the_same() -> None:
    inputs, paths = scan_inputs(**CASES["es2d"])
    with_gradients = mamba_cuda.selective_scan(*inputs, paths)
    with torch.no_grad():
        assert torch.equal(mamba_cuda.selective_scan(*inputs, paths), with_gradients)


@pytest.mark.usefixtures("stand_in")
def test_selective_scan_compiles_without_graph_breaks() -> None:
    inputs, paths = scan_inputs(**CASES["es2d"])
    compiled = torch.compile(mamba_cuda.selective_scan, fullgraph=True, backend="aot_eager")
    assert_matches_reference(inputs, paths, compiled, STAND_IN_TOLERANCE[torch.float32])


def test_selective_scan_rejects_more_states_than_the_kernels_hold() -> None:
    inputs, paths = scan_inputs(grid=(1, 2), d_inner=1, d_state=257)
    with pytest.raises(ValueError, match="d_state: 257 given"):
        mamba_cuda.selective_scan(*inputs, paths)


def test_is_available_refuses_a_cpu() -> None:
    assert not mamba_cuda.is_available("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not mamba_cuda.is_available("cuda"), reason="needs a CUDA device and mamba-ssm")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_selective_scan_matches_reference_on_cuda(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, paths = scan_inputs(**case, device="cuda", dtype=dtype)
    assert_matches_reference(inputs, paths, mamba_cuda.selective_scan, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not mamba_cuda.is_available("cuda"), reason="needs a CUDA device and mamba-ssm")
@pytest.mark.parametrize("name", ["stage_3", "es2d_large"])
def test_selective_scan_compiles_without_graph_breaks_on_cuda(name: str) -> None:
    inputs, paths = scan_inputs(**GPU_CASES[name], device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(mamba_cuda.selective_scan, fullgraph=True)
    assert_matches_reference(inputs, paths, compiled, TOLERANCE[torch.bfloat16])
