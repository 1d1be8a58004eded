"""The window attention kernels against torch's path in float64: the output and every gradient.

If these fail, pictures and trained weights from a GPU are wrong in a way that no other test sees. Without a
GPU the kernels run in Triton's interpreter, which computes them with numpy: so CI guards their mathematics
and their indices; the `gpu` tests guard what the compiler makes of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from model.network import (
    depthwise_conv,
    depthwise_conv_kernels,
    fused_norms_kernels,
    window_attention,
    window_attention_kernels,
)
from model.network.attention import WindowAttention
from model.network.geometry import GridGeometry
from model.network.lamamba import LaMambaDiff
from model.network.scan import ScanBackend, vectorized
from model.network.vssm import VisualStateSpace
from tests.kernel_cases import SMALL_NETWORK, parametrize_cases, parametrize_dtypes, relative_rms
from tests.triton_interpreter import interpret_kernels

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

NAMES = ("qkv", "table", "norm_weight")
TOLERANCE = {  # relative RMS of the output and of each gradient
    torch.float32: 1e-5,  # products of three TF32 parts, 2**-22 each; order of sums; fast exp2
    # p and ds are rounded to 2**-9 before their products, then the results; the interpreter cuts them off
    # instead, which doubles the error: measured 6e-3 at most.
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,  # the same with 2**-12, rounded: measured 3e-4
}
INTERPRETER_TOLERANCE = TOLERANCE | {torch.float32: 1e-6}  # numpy's fp32: measured 3e-7


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of an attention."""

    batch: int = 1
    grid: tuple[int, int] = (8, 8)
    num_heads: int = 2
    head_dim: int = 12
    window_size: int = 4
    shifted: bool = True
    qk_norm: bool = False

    def module(self) -> WindowAttention:
        torch.manual_seed(0)
        width = self.num_heads * self.head_dim
        module = WindowAttention(
            width,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shifted=self.shifted,
            qk_norm=self.qk_norm,
        )
        # The projections are torch's on both paths: left out, so that qkv and the gradients are the kernels'.
        module.qkv, module.proj = torch.nn.Identity(), torch.nn.Identity()
        torch.nn.init.normal_(module.relative_position_bias)
        if module.qk_norm_weight is not None:
            torch.nn.init.normal_(module.qk_norm_weight, mean=1.0, std=0.5)
        return module

    def geometry(self) -> GridGeometry:
        return GridGeometry(
            *self.grid,
            vssm="ss2d",
            scan_window_size=1,
            attention="shifted_window",
            window_size=self.window_size,
        )

    def qkv(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, *self.grid, 3 * self.num_heads * self.head_dim, generator=generator)


CASES = {
    "one_window": Case(grid=(4, 4), batch=3),
    "unshifted": Case(grid=(8, 4), shifted=False),
    "shifted": Case(batch=3),
    "shifted_along_columns": Case(grid=(4, 12)),
    "shifted_along_rows": Case(grid=(12, 4), head_dim=20),
    "two_by_two": Case(grid=(4, 6), window_size=2),
    "one_token": Case(grid=(1, 3), window_size=1, head_dim=1),
    "odd_window": Case(grid=(9, 6), window_size=3, num_heads=3),
    "grid_smaller_than_the_window": Case(grid=(3, 2)),
    "strip_of_windows": Case(grid=(3, 16), window_size=8),
    "window_of_49": Case(grid=(7, 14), window_size=7, head_dim=20),
    "window_of_64": Case(grid=(16, 16), window_size=8, head_dim=20),
    "head_dim_40": Case(grid=(8, 16), window_size=8, head_dim=40),
    "head_dim_80": Case(grid=(8, 8), window_size=8, head_dim=80, batch=3),
    "qk_norm": Case(batch=3, qk_norm=True),
    "qk_norm_odd_window": Case(grid=(9, 6), window_size=3, num_heads=3, head_dim=20, qk_norm=True),
}
GPU_CASES = {
    **CASES,
    "stage_1": Case(batch=33, grid=(32, 32), window_size=8, num_heads=16, head_dim=20),
    "stage_1_qk_norm": Case(batch=33, grid=(32, 32), window_size=8, num_heads=16, head_dim=20, qk_norm=True),
    "stage_3_qk_norm": Case(batch=33, grid=(8, 8), window_size=8, num_heads=16, head_dim=80, qk_norm=True),
    "stage_1_unshifted": Case(batch=8, grid=(32, 32), window_size=8, num_heads=16, shifted=False),
    "stage_2": Case(batch=33, grid=(16, 16), window_size=8, num_heads=16, head_dim=40),
    "stage_3": Case(batch=33, grid=(8, 8), window_size=8, num_heads=16, head_dim=80),
    "one_row": Case(grid=(32, 32), window_size=8, num_heads=16, head_dim=20),
    "not_square": Case(batch=2, grid=(24, 40), window_size=8, num_heads=8, head_dim=24),
    "head_dim_128": Case(batch=2, grid=(16, 16), window_size=8, head_dim=128),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(window_attention_kernels, monkeypatch)


def assert_matches_reference(
    case: Case,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    transform: Callable[[Any], Any] = lambda module: module,
) -> None:
    """`transform`: what becomes of the module with kernels, e.g. `torch.compile`."""
    module, exact = case.module().to(device, dtype), case.module().to(device)
    geometry, qkv = case.geometry().to(device), case.qkv().to(device, dtype).requires_grad_()
    exact.load_state_dict(module.state_dict())
    exact.double()
    exact_qkv = qkv.detach().double().requires_grad_()
    expected = exact(exact_qkv, case.geometry().to(device).double())
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    expected_gradients = torch.autograd.grad(expected, (exact_qkv, *_weights(exact)), dout.double())

    assert window_attention.accepts(geometry.window or (0, 0), case.head_dim)
    module.use_kernels = True
    module._bias = lambda *_: pytest.fail("torch's path ran")
    torch.use_deterministic_algorithms(True)  # fills memory with NaN: what a kernel leaves out shows
    try:
        out = transform(module)(qkv, geometry)
        gradients = torch.autograd.grad(out, (qkv, *_weights(module)), dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.dtype == dtype
    errors = {"out": relative_rms(out, expected)}
    for name, gradient, exact_gradient in zip(NAMES, gradients, expected_gradients, strict=False):
        assert gradient.dtype == dtype
        # One key a query: the softmax is constant, and the gradient of its logits nothing but rounding.
        if exact_gradient.norm() > 0:
            errors[name] = relative_rms(gradient, exact_gradient)
        else:
            assert gradient.abs().max() == 0
    assert max(errors.values()) <= tolerance, errors


def _weights(module: WindowAttention) -> list[Tensor]:
    return list(module.parameters())


@pytest.mark.usefixtures("interpreted")
@parametrize_cases(CASES)
def test_window_attention_matches_reference(case: Case) -> None:
    assert_matches_reference(case, "cpu", torch.float32, INTERPRETER_TOLERANCE[torch.float32])


@pytest.mark.usefixtures("interpreted")
@parametrize_dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("name", ["shifted", "one_window", "qk_norm"])
def test_window_attention_reads_short_dtypes(name: str, dtype: torch.dtype) -> None:
    assert_matches_reference(CASES[name], "cpu", dtype, INTERPRETER_TOLERANCE[dtype])


@pytest.mark.usefixtures("interpreted")
def test_window_attention_without_gradients_is_the_same() -> None:
    case = CASES["shifted"]
    module, geometry, qkv = case.module(), case.geometry(), case.qkv()
    module.use_kernels = True
    with_gradients = module(qkv, geometry)
    with torch.no_grad():
        assert torch.equal(module(qkv, geometry), with_gradients)


@pytest.mark.usefixtures("interpreted")
def test_window_attention_of_a_row_ignores_its_neighbours() -> None:
    case = dataclasses.replace(CASES["shifted"], batch=5)
    module, geometry, qkv = case.module(), case.geometry(), case.qkv()
    module.use_kernels = True
    assert torch.equal(module(qkv[1:2], geometry), module(qkv, geometry)[1:2])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("programs", [1, 6, 1000], ids=["one_chunk", "uneven_chunks", "a_window_each"])
def test_window_attention_adds_up_whatever_its_grid(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Any division of the windows among programs gives every window its output and the bias its gradient."""
    monkeypatch.setattr(window_attention, "FORWARD_PROGRAMS", programs)
    monkeypatch.setattr(window_attention, "BACKWARD_PROGRAMS", programs)
    case = dataclasses.replace(CASES["shifted"], batch=2)
    assert_matches_reference(case, "cpu", torch.float32, INTERPRETER_TOLERANCE[torch.float32])


@pytest.mark.usefixtures("interpreted")
def test_window_attention_takes_a_table_of_another_dtype() -> None:
    """As under autocast, where qkv is bf16 and the parameters fp32."""
    case = CASES["shifted"]
    module = case.module()
    table, qkv = module.relative_position_bias, case.qkv().bfloat16().requires_grad_()
    out = window_attention.window_attention(qkv, table, window=(4, 4), shift=(2, 2))
    dqkv, dtable = torch.autograd.grad(out.float().square().sum(), (qkv, table))
    assert (out.dtype, dqkv.dtype, dtable.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = module.double()(qkv.detach().double(), case.geometry().double())
    assert relative_rms(out, expected) < INTERPRETER_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", NAMES)
def test_window_attention_rejects_dtypes_it_cannot_read(name: str) -> None:
    tensors = {
        "qkv": torch.zeros(1, 4, 4, 6),
        "table": torch.zeros(49, 2),
        "norm_weight": torch.ones(2, 1),
    }
    tensors[name] = tensors[name].double()
    with pytest.raises(ValueError, match=f"{name}: torch.float64 given"):
        window_attention.window_attention(**tensors, window=(4, 4), shift=(0, 0))


def test_windows_too_large_for_the_kernels_stay_torchs() -> None:
    case = Case(grid=(9, 9), window_size=9, head_dim=4)
    module, geometry, qkv = case.module(), case.geometry(), case.qkv()
    expected = module(qkv, geometry)
    module.use_kernels = True
    assert torch.equal(module(qkv, geometry), expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["shifted", "qk_norm_odd_window"])
def test_window_attention_traces_without_graph_breaks(name: str) -> None:
    """The operators' fakes have the shapes and dtypes that the kernels return."""
    assert_matches_reference(
        CASES[name],
        "cpu",
        torch.float32,
        INTERPRETER_TOLERANCE[torch.float32],
        lambda module: torch.compile(module, fullgraph=True, backend="aot_eager"),
    )


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("size", [(8, 8), (16, 8)], ids=["square", "other_size"])
def test_network_with_kernels_equals_the_network_with_torchs_operations(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    for kernels in (depthwise_conv_kernels, fused_norms_kernels):
        interpret_kernels(kernels, monkeypatch)
    monkeypatch.setattr(depthwise_conv, "FORWARD_PROGRAMS", 1)  # fewer, longer ones: the interpreter's time
    torch.manual_seed(0)
    network = LaMambaDiff(**dataclasses.asdict(SMALL_NETWORK)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if ".modulation." in name or name.endswith("relative_position_bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = (torch.randn(2, 4, *size), torch.tensor([0.0, 700.5]), torch.tensor([0, 5]))
    expected = network(*inputs).sample
    network.use_scan_backend(ScanBackend("kernels", vectorized.selective_scan, kernels=True))
    assert all(m.use_kernels for m in network.modules() if isinstance(m, WindowAttention | VisualStateSpace))
    assert relative_rms(network(*inputs).sample, expected) < 2e-5  # as another batch size makes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@parametrize_cases(GPU_CASES)
def test_window_attention_matches_reference_on_cuda(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(case, "cuda", dtype, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["stage_1", "stage_3", "odd_window"])
def test_window_attention_compiles_without_graph_breaks(name: str) -> None:
    assert_matches_reference(
        GPU_CASES[name],
        "cuda",
        torch.bfloat16,
        TOLERANCE[torch.bfloat16],
        lambda module: torch.compile(module, fullgraph=True),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_window_attention_repeats_bit_for_bit_on_cuda() -> None:
    case = GPU_CASES["stage_1"]
    module, geometry = case.module().cuda().bfloat16(), case.geometry().cuda()
    module.use_kernels = True
    qkv = case.qkv().cuda().bfloat16().requires_grad_()
    runs = []
    for _ in range(2):
        out = module(qkv, geometry)
        inputs = (qkv, module.relative_position_bias)
        runs.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_window_attention_replays_as_a_cuda_graph() -> None:
    case = GPU_CASES["stage_2"]
    module, geometry = case.module().cuda().bfloat16().requires_grad_(False), case.geometry().cuda()
    module.use_kernels = True
    qkv = torch.zeros_like(case.qkv()).cuda().bfloat16()
    module(qkv, geometry)  # compiles the kernel, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(qkv, geometry)
    qkv.copy_(case.qkv())
    graph.replay()
    assert torch.equal(out, module(qkv, geometry))
