"""The depthwise convolution's kernels against torch in float64: the output and every gradient.

If these fail, pictures and trained weights from a GPU are wrong in a way that no other test sees. Without a
GPU the kernels run in Triton's interpreter, which computes them with numpy: so CI guards their mathematics
and their indices; the `gpu` tests guard what the compiler makes of them. The whole network with all kernels
is tested beside the attention's (`test_window_attention.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.network import depthwise_conv, depthwise_conv_kernels, fused_norms_kernels
from model.network.depthwise_conv import conv3x3_silu
from model.network.geometry import GridGeometry
from model.network.scan import resolve_scan_backend
from model.network.vssm import VisualStateSpace
from tests.kernel_cases import parametrize_cases, parametrize_dtypes, relative_rms
from tests.triton_interpreter import interpret_kernels

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

TOLERANCE = {  # relative RMS of the output and of each gradient
    torch.float32: 1e-5,  # fast exp2 and rsqrt, 2**-22 each; order of sums, over 2**17 tokens for the weights
    # The results are rounded to 2**-9, du after dpre was; the interpreter cuts them off instead, which
    # doubles the error: measured 6e-3 at most.
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,  # the same with 2**-12, rounded: measured 3e-4
}
INTERPRETER_TOLERANCE = TOLERANCE | {torch.float32: 1e-6}  # numpy's fp32: measured 2e-7


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of a convolution; `others`: channels beside u in the tensor that it is a slice of."""

    batch: int = 1
    grid: tuple[int, int] = (8, 8)
    channels: int = 32
    bias: bool = True
    others: int = 32

    def tensors(self) -> dict[str, Tensor]:
        """u with what it is a slice of, the weight, the bias if any."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tensors = {
            "u": randn(self.batch, *self.grid, self.channels + self.others),
            "weight": randn(self.channels, 1, 3, 3) / 2,
        }
        return tensors | ({"bias": randn(self.channels)} if self.bias else {})

    def slice(self, tensor: Tensor) -> Tensor:
        return tensor[..., : self.channels]


CASES = {
    "strips_of_a_row": Case(grid=(5, 12), bias=False),
    "odd": Case(batch=3, grid=(7, 5), channels=9, others=4),
    "more_blocks_of_channels": Case(batch=2, grid=(3, 6), channels=160, others=160),
    "contiguous": Case(grid=(8, 4), others=0),
    "one_token": Case(batch=3, grid=(1, 1), channels=5, others=0),
    "one_row": Case(batch=2, grid=(1, 9), channels=16, others=1),
    "one_column": Case(batch=2, grid=(9, 1), channels=1, bias=False),
    "tall": Case(grid=(33, 2), channels=16),
}
GPU_CASES = {
    **CASES,
    "stage_1": Case(batch=128, grid=(32, 32), channels=640, others=640),
    "stage_2": Case(batch=33, grid=(16, 16), channels=1280, others=1280, bias=False),
    "stage_3": Case(batch=33, grid=(8, 8), channels=2560, others=2560, bias=False),
    "stage_1_of_two": Case(batch=2, grid=(32, 32), channels=640, others=640, bias=False),
    "stage_3_of_one": Case(grid=(8, 8), channels=2560, others=2560),
    "large_grid": Case(batch=2, grid=(128, 128), channels=640, others=640),
    "not_square": Case(batch=5, grid=(24, 43), channels=384, others=384),
    "odd_channels": Case(batch=9, grid=(17, 31), channels=131, others=131),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(depthwise_conv_kernels, monkeypatch)
    # As for a device that runs one program at a time, which the interpreter is: fewer, longer programs.
    monkeypatch.setattr(depthwise_conv, "FORWARD_PROGRAMS", 1)
    monkeypatch.setattr(depthwise_conv, "BACKWARD_PROGRAMS", 1)


def reference(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return F.silu(out).permute(0, 2, 3, 1)


def assert_matches_reference(
    case: Case,
    device: str,
    dtype: torch.dtype,
    transform: Callable[[Any], Any] = lambda function: function,
) -> None:
    """`transform`: what becomes of the function, e.g. `torch.compile`."""
    inputs = {name: x.to(device, dtype).requires_grad_() for name, x in case.tensors().items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = reference(**exact | {"u": case.slice(exact["u"])})
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected_gradients = torch.autograd.grad(expected, tuple(exact.values()), dout.double())

    def convolve(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv3x3_silu(case.slice(u), weight, bias)

    torch.use_deterministic_algorithms(True)  # fills memory with NaN: what a kernel leaves out shows
    try:
        out = transform(convolve)(**inputs)
        gradients = torch.autograd.grad(out, tuple(inputs.values()), dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.dtype == dtype
    assert out.is_contiguous()
    errors = {"out": relative_rms(out, expected)}
    for name, gradient, exact_gradient in zip(inputs, gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        errors[name] = relative_rms(gradient, exact_gradient)
    tolerance = TOLERANCE if device == "cuda" else INTERPRETER_TOLERANCE
    assert max(errors.values()) <= tolerance[dtype], errors


@pytest.mark.usefixtures("interpreted")
@parametrize_cases(CASES)
def test_convolution_matches_reference(case: Case) -> None:
    assert_matches_reference(case, "cpu", torch.float32)


@pytest.mark.usefixtures("interpreted")
@parametrize_dtypes(torch.bfloat16, torch.float16)
def test_convolution_reads_short_dtypes(dtype: torch.dtype) -> None:
    assert_matches_reference(CASES["odd"], "cpu", dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("programs", [1, 5, 1000], ids=["one_program", "uneven_groups", "short_strips"])
def test_convolution_adds_up_whatever_its_grid(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Any cut into strips and programs gives every token its output and the weights their gradients."""
    for name, value in {"COLUMNS": 2, "TILE": 32, "MAX_BLOCK_C": 8}.items():
        monkeypatch.setattr(depthwise_conv, name, value)
    monkeypatch.setattr(depthwise_conv, "FORWARD_PROGRAMS", programs)
    monkeypatch.setattr(depthwise_conv, "BACKWARD_PROGRAMS", programs)
    assert_matches_reference(Case(batch=3, grid=(5, 3), channels=12, others=2), "cpu", torch.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)], ids=["rows", "turned", "nchw"])
def test_convolution_takes_any_strides(axes: tuple[int, ...]) -> None:
    tensors = Case(batch=2, grid=(6, 4), channels=4, others=0).tensors()
    u = tensors.pop("u").permute(axes)[:, ::2]
    weight, bias = (F.pad(x, (0,) * (2 * x.ndim - 1) + (u.shape[3],))[: u.shape[3]] for x in tensors.values())
    out = conv3x3_silu(u, weight, bias)
    assert out.is_contiguous()
    assert relative_rms(out, reference(u.double(), weight.double(), bias.double())) < 1e-6


@pytest.mark.usefixtures("interpreted")
def test_convolution_of_a_row_ignores_its_neighbours() -> None:
    tensors = dataclasses.replace(CASES["odd"], batch=5).tensors()
    u, weight = tensors["u"][..., :9], tensors["weight"]
    assert torch.equal(conv3x3_silu(u[1:2], weight, None), conv3x3_silu(u, weight, None)[1:2])


@pytest.mark.usefixtures("interpreted")
def test_convolution_takes_weights_of_another_dtype() -> None:
    """As under autocast, where u is bf16 and the parameters fp32."""
    tensors = Case(others=0).tensors()
    inputs = {name: x.requires_grad_() for name, x in (tensors | {"u": tensors["u"].bfloat16()}).items()}
    out = conv3x3_silu(inputs["u"], inputs["weight"], inputs["bias"])
    gradients = torch.autograd.grad(out.float().square().sum(), tuple(inputs.values()))
    assert [x.dtype for x in (out, *gradients)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    expected = reference(**{name: x.double() for name, x in inputs.items()})
    assert relative_rms(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ["u", "weight", "bias"])
def test_convolution_rejects_dtypes_it_cannot_read(name: str) -> None:
    tensors = Case(others=0).tensors()
    tensors[name] = tensors[name].double()
    with pytest.raises(ValueError, match=f"{name}: torch.float64 given"):
        conv3x3_silu(tensors["u"], tensors["weight"], tensors["bias"])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["one_row", "one_column"])
def test_convolution_traces_without_graph_breaks(name: str) -> None:
    """The operators' fakes have the shapes and dtypes that the kernels return."""
    assert_matches_reference(
        CASES[name],
        "cpu",
        torch.float32,
        lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"),
    )


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_state_space_module_with_kernels_equals_torchs(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(fused_norms_kernels, monkeypatch)
    torch.manual_seed(0)
    module = VisualStateSpace(
        8, d_state=1, num_directions=4, conv_bias=bias, scan_backend=resolve_scan_backend("vectorized")
    )
    module.initialize_weights()
    geometry = GridGeometry(4, 6, vssm="ss2d", scan_window_size=1, attention="shifted_window", window_size=2)
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    inputs = (x, *module.parameters())
    runs = []
    for module.use_kernels in (False, True):
        out = module(x, geometry)
        runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for expected, value in zip(*runs, strict=True):
        assert relative_rms(value, expected.double()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@parametrize_cases(GPU_CASES)
def test_convolution_matches_reference_on_cuda(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(case, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["stage_1_of_two", "stage_3", "odd"])
def test_convolution_compiles_without_graph_breaks(name: str) -> None:
    assert_matches_reference(
        GPU_CASES[name],
        "cuda",
        torch.bfloat16,
        lambda function: torch.compile(function, fullgraph=True),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_convolution_repeats_bit_for_bit_on_cuda() -> None:
    case = GPU_CASES["stage_1"]
    inputs = {name: x.cuda().bfloat16().requires_grad_() for name, x in case.tensors().items()}
    runs = []
    for _ in range(2):
        out = conv3x3_silu(case.slice(inputs["u"]), inputs["weight"], inputs["bias"])
        runs.append([out, *torch.autograd.grad(out, tuple(inputs.values()), torch.ones_like(out))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_convolution_replays_as_a_cuda_graph() -> None:
    case = GPU_CASES["stage_2"]
    u, weight = (x.cuda().bfloat16() for x in case.tensors().values())
    static = torch.zeros_like(u)
    conv3x3_silu(case.slice(static), weight, None)  # compiles the kernel, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = conv3x3_silu(case.slice(static), weight, None)
    static.copy_(u)
    graph.replay()
    assert torch.equal(out, conv3x3_silu(case.slice(u), weight, None))
