"""The Triton scan against the loop in float64: its output and every gradient.

If these fail, pictures and trained weights from a GPU are wrong in a way that no other test sees. Without a
GPU the kernels run in Triton's interpreter, which computes them with numpy: so CI guards their mathematics
and their masks; the `gpu` tests guard what the compiler makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from model.network.scan import reference, triton_kernels, triton_scan
from model.network.scan.paths import scan_paths
from tests.triton_interpreter import interpret_kernels

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

NAMES = ("u", "dt", "dt_proj_weight", "A_log", "B", "C", "D", "delta_bias")
TOLERANCE = {  # relative RMS of y and of each gradient
    torch.float32: 1e-5,  # order of sums over path and batch; a h_{l-1} taken as h_l - b_l; fast exp2
    torch.bfloat16: 6e-3,  # y, du, ddelta of each direction rounded to 2**-9, du again after its sum
    torch.float16: 1e-3,  # likewise to 2**-12
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of a scan, and what is peculiar about it."""

    batch: int = 1
    grid: tuple[int, int] = (4, 8)
    d_inner: int = 40
    rank: int = 3
    d_state: int = 1
    vssm: str = "ss2d_continuous"
    dt_scale: float = 1.0
    layout: str = "contiguous"

    def inputs(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        """Leaves in the order of NAMES, and the paths; steps lie about 0.1, as they do before training."""
        generator = torch.Generator().manual_seed(0)
        paths = scan_paths(self.vssm, *self.grid)
        length, directions = self.grid[0] * self.grid[1], len(paths)

        def tokens(*shape: int) -> Tensor:
            return torch.randn(self.batch, length, *shape, generator=generator)

        def weights(*shape: int) -> Tensor:
            return torch.randn(directions, self.d_inner, *shape, generator=generator).to(device)

        per_token = [
            tokens(self.d_inner),
            tokens(directions, self.rank) * self.dt_scale,
            tokens(directions, self.d_state),
            tokens(directions, self.d_state),
        ]
        u, dt, B, C = (LAYOUTS[self.layout](tensor.to(device, dtype)) for tensor in per_token)
        dt_proj_weight = (weights(self.rank) * self.rank**-0.5).to(dtype)
        inputs = [u, dt, dt_proj_weight, weights(self.d_state), B, C, weights(), weights() - 2.0]
        return [tensor.requires_grad_() for tensor in inputs], paths.to(device)


def _gapped(tensor: Tensor) -> Tensor:
    """A part of a wider tensor, as the parts of one projection are."""
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 3)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "gapped": _gapped,
    "channels_first": lambda tensor: tensor.transpose(1, -1).contiguous().transpose(1, -1),
}

CASES = {
    "one_token": Case(grid=(1, 1), d_inner=1, rank=1),
    "seven_tokens": Case(grid=(1, 7), batch=3),
    "tiles_of_64_channels": Case(grid=(3, 5), d_inner=64, rank=16),
    "one_channel": Case(d_inner=1),
    "eight_by_eight": Case(grid=(8, 8), d_inner=96, rank=20),
    "not_square": Case(grid=(4, 34), d_inner=40),
    "channels_off_the_block": Case(grid=(2, 9), d_inner=130, batch=2),
    "forty_ranks": Case(grid=(4, 9), d_inner=65, rank=40),
    "three_states": Case(grid=(3, 7), d_state=3),
    "sixteen_states": Case(grid=(2, 12), d_inner=8, d_state=16),
    "three_states_long": Case(grid=(6, 12), d_state=3, d_inner=8),
    "es2d": Case(grid=(12, 12), batch=3, vssm="es2d"),
    "two_directions": Case(grid=(5, 5), vssm="vim"),
    "decay_underflows": Case(grid=(5, 7), dt_scale=40.0),
    "gapped": Case(batch=2, layout="gapped", d_state=3),
    "channels_first": Case(batch=2, layout="channels_first"),
}
GPU_CASES = {
    **CASES,
    "stage_1": Case(batch=128, grid=(32, 32), d_inner=96),
    "stage_2": Case(batch=128, grid=(16, 16), d_inner=192),
    "stage_3": Case(batch=128, grid=(8, 8), d_inner=384),
    "few_rows": Case(batch=2, grid=(32, 32), d_inner=640),
    "long": Case(grid=(64, 66), d_inner=130),
    "sixteen_states_long": Case(batch=2, grid=(16, 16), d_inner=200, d_state=16),
    "es2d_large": Case(batch=8, grid=(32, 32), d_inner=96, vssm="es2d"),
}
# What the launch takes the card for, so that small cases are cut as large ones are.
LOADS = {
    "few_rows": {},
    "many_rows": {"FILLING_PROGRAMS": 1},  # wide tiles, one walk of each path
    "chunks": {"CHUNK_TILES": 1},  # paths are cut as soon as they have two tiles
}
CUT_CASES = ("seven_tokens", "not_square", "channels_off_the_block")
INTERPRETER_TOLERANCE = 2e-6  # fp32 with numpy's exp: measured 5e-7 at most


def _cases(cases: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """What a kernel leaves unwritten in its outputs shows as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    interpret_kernels(triton_kernels, monkeypatch)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", _scan_by_rows)


def _scan_by_rows(self: Any, inputs: Any) -> list[Any]:
    """The interpreter's associative scan, row by row: its own goes by element, and takes minutes."""
    arrays = [tensor.handle.data for tensor in inputs]
    outputs = [array.copy() for array in arrays]
    for i in range(1, arrays[0].shape[self.axis]):
        row = (slice(None),) * self.axis
        previous = [self.to_tensor(y[(*row, i - 1)], x.dtype) for x, y in zip(inputs, outputs, strict=True)]
        current = [self.to_tensor(y[(*row, i)], x.dtype) for x, y in zip(inputs, arrays, strict=True)]
        composed = self.combine_fn.fn(*previous, *current)
        composed = composed if isinstance(composed, tuple) else (composed,)
        for output, value in zip(outputs, composed, strict=True):
            output[(*row, i)] = value.handle.data
    return [self.to_tensor(output, x.dtype) for x, output in zip(inputs, outputs, strict=True)]


def relative_rms(value: Tensor, expected: Tensor) -> float:
    """The error's norm over the expected norm; the error's own where zero is expected."""
    assert value.shape == expected.shape
    error = (value.double() - expected).norm()
    return (error / expected.norm() if expected.norm() > 0 else error).item()


def assert_matches_reference(
    case: Case, device: str, dtype: torch.dtype, scan: Any, tolerance: float | None = None
) -> None:
    inputs, paths = case.inputs(device, dtype)
    with uninitialized_memory_is_nan():
        groups = scan(*inputs, paths)
        y = groups.sum(2, keepdim=True, dtype=torch.float32)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        gradients = torch.autograd.grad(y, inputs, grad_y)
    assert groups.dtype in (torch.float32, dtype)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = reference.selective_scan(*exact_inputs, paths)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad_y.double())
    errors = {"y": relative_rms(y, exact)}
    for name, tensor, gradient, expected in zip(NAMES, inputs, gradients, exact_gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        errors[name] = relative_rms(gradient, expected)
    assert max(errors.values()) <= (tolerance or TOLERANCE[dtype]), errors


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("case", "load"),
    [
        pytest.param(case, load, id=f"{name}-{load_name}")
        for name, case in CASES.items()
        for load_name, load in LOADS.items()
        # Several states have one way to be cut; the other ways are the same to most cases, and take seconds.
        if not load or (case.d_state == 1 and name in CUT_CASES)
    ],
)
def test_selective_scan_matches_reference(
    case: Case, load: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in load.items():
        monkeypatch.setattr(triton_scan, name, value)
    assert_matches_reference(case, "cpu", torch.float32, triton_scan.selective_scan, INTERPRETER_TOLERANCE)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selective_scan_reads_half_precisions(
    dtype: torch.dtype, load: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(grid=(5, 9), d_inner=96, rank=5)
    for name, value in load.items():
        monkeypatch.setattr(triton_scan, name, value)
    assert_matches_reference(case, "cpu", dtype, triton_scan.selective_scan)


@pytest.mark.usefixtures("interpreted")
def test_selective_scan_without_gradients_is_the_same() -> None:
    inputs, paths = CASES["three_states"].inputs()
    with_gradients = triton_scan.selective_scan(*inputs, paths)
    with torch.no_grad():
        y = triton_scan.selective_scan(*inputs, paths)
    assert torch.equal(y, with_gradients)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selective_scan_reads_B_and_C_of_one_projection_as_pairs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_scan, "FILLING_PROGRAMS", 1)
    assert_pairs_change_nothing(Case(batch=2, grid=(3, 7), d_inner=128, rank=4), "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selective_scan_reads_B_and_C_of_one_projection_as_pairs_on_cuda(dtype: torch.dtype) -> None:
    assert_pairs_change_nothing(Case(batch=128, grid=(32, 32), d_inner=640, rank=20), "cuda", dtype)


def assert_pairs_change_nothing(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs, paths = case.inputs(device, dtype)
    u, dt, weight, A_log, B, C, D, bias = (tensor.detach() for tensor in inputs)
    projection = torch.cat([dt, B, C], dim=-1)
    dt, paired_B, paired_C = projection.split((case.rank, 1, 1), dim=-1)
    assert triton_scan._are_pairs(paired_B, paired_C)
    assert not triton_scan._are_pairs(B, C)
    paired = triton_scan.selective_scan(u, dt, weight, A_log, paired_B, paired_C, D, bias, paths)
    apart = triton_scan.selective_scan(u, dt, weight, A_log, B, C, D, bias, paths)
    assert paired.isfinite().all()
    assert torch.equal(paired, apart)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("grid", [(4, 8), (8, 9)], ids=["one_tile", "many_tiles"])
def test_selective_scan_of_a_row_ignores_its_neighbours(grid: tuple[int, int]) -> None:
    (u, dt, weight, A, B, C, D, bias), paths = Case(batch=3, grid=grid).inputs()
    together = triton_scan.selective_scan(u, dt, weight, A, B, C, D, bias, paths)
    alone = triton_scan.selective_scan(u[1:2], dt[1:2], weight, A, B[1:2], C[1:2], D, bias, paths)
    assert torch.equal(alone, together[1:2])


@pytest.mark.parametrize("name", ["u", "A_log"])
def test_selective_scan_rejects_dtypes_it_cannot_read(name: str) -> None:
    inputs, paths = Case().inputs()
    inputs[NAMES.index(name)] = inputs[NAMES.index(name)].double()
    with pytest.raises(ValueError, match=f"{name}: torch.float64 given"):
        triton_scan.selective_scan(*inputs, paths)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["es2d", "three_states"])
def test_selective_scan_traces_without_graph_breaks(name: str) -> None:
    """The operators' fakes have the shapes and dtypes that the kernels return."""
    traced = torch.compile(triton_scan.selective_scan, fullgraph=True, backend="aot_eager")
    assert_matches_reference(CASES[name], "cpu", torch.float32, traced, INTERPRETER_TOLERANCE)


def test_is_available_refuses_a_cpu_without_the_interpreter() -> None:
    assert triton_scan.is_available("cuda") == torch.cuda.is_available()
    assert not triton_scan.is_available("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@_cases(GPU_CASES)
def test_selective_scan_matches_reference_on_cuda(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(case, "cuda", dtype, triton_scan.selective_scan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["stage_3", "sixteen_states_long", "es2d_large", "gapped"])
def test_selective_scan_compiles_without_graph_breaks(name: str) -> None:
    compiled = torch.compile(triton_scan.selective_scan, fullgraph=True)
    assert_matches_reference(GPU_CASES[name], "cuda", torch.bfloat16, compiled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_selective_scan_repeats_bit_for_bit_on_cuda() -> None:
    inputs, paths = replace(GPU_CASES["stage_2"], batch=8).inputs("cuda", torch.bfloat16)
    runs = []
    for _ in range(2):
        y = triton_scan.selective_scan(*inputs, paths)
        runs.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
