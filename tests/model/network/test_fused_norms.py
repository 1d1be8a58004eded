"""The norm kernels against torch in float64, and the network that runs on them against torch's path.

If these fail, pictures from a GPU are wrong in a way that no other test sees. Without a GPU the kernels run
in Triton's interpreter, which computes them with numpy: so CI guards their mathematics and their indices;
the `gpu` tests guard what the compiler makes of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.network import depthwise_conv, fused_norms, fused_norms_kernels, window_attention
from model.network.block import FeedForward
from model.network.lamamba import LaMambaDiff
from model.network.resample import PatchExpanding, PatchMerging
from model.network.residual import Residual, ResidualNorm
from model.network.scan import ScanBackend, vectorized
from tests.kernel_cases import SMALL_NETWORK, parametrize_cases, parametrize_dtypes, relative_rms
from tests.triton_interpreter import interpret_kernels

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

TOLERANCE = {  # relative RMS
    torch.float32: 1e-6,  # order of sums, fast exp and rsqrt: 2**-22
    # The result rounded to 2**-9 or 2**-12, once; the interpreter cuts bf16 off, which doubles the error.
    torch.bfloat16: 4e-3,
    torch.float16: 4e-4,
}
BACKWARD_TOLERANCE = {  # by the shorter of the inputs' dtypes
    torch.float32: 1e-5,  # sums over tokens cancel
    # Three times the result's own rounding: the gate's norm saves the sum of y over the groups rounded, whose
    # error is a part of its deviation and so weighs more; the interpreter doubles both.
    torch.bfloat16: 1.2e-2,
    torch.float16: 1.2e-3,
}
EPS = 1e-5
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and kind of a residual's norm."""

    width: int
    batch: int = 2
    grid: tuple[int, int] = (3, 5)
    branch: bool = True
    affine: bool = True
    mean: float = 0.0


CASES = {
    "one_channel": Case(width=1),
    "width_7": Case(width=7, batch=3),
    "width_20": Case(width=20),
    "width_264": Case(width=264),
    "stage_1": Case(width=320, batch=3),
    "stage_2": Case(width=640),
    "stage_3": Case(width=1280, grid=(2, 2)),
    "stage_4": Case(width=2560, grid=(1, 3)),
    "power_of_two": Case(width=1024, grid=(1, 3)),
    "one_token": Case(width=320, batch=1, grid=(1, 1)),
    "no_branch": Case(width=320, branch=False),
    "no_weights": Case(width=20, affine=False),
    "neither": Case(width=320, branch=False, affine=False),
    "far_from_zero": Case(width=320, mean=300.0),
}
# Of both programs, one warp's and four; XL's stages at 256 px.
GPU_CASES = CASES | {
    f"stage_{stage}_of_{batch}": Case(width=320 << (stage - 1), batch=batch, grid=(64 >> stage,) * 2)
    for stage in (1, 2, 3, 4)
    for batch in (1, 2, 33, 128)
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(fused_norms_kernels, monkeypatch)


def random(*shape: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def poisoned(function: Callable[[], Any]) -> Any:
    """`function`, its memory filled with NaN before: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    try:
        return function()
    finally:
        torch.use_deterministic_algorithms(False)


def assert_residual_norm(case: Case, device: str, dtype: torch.dtype) -> None:
    shape = (case.batch, *case.grid, case.width)
    x = (random(*shape, seed=0) + case.mean).to(device, dtype)
    branch = random(*shape, seed=1, device=device, dtype=dtype) if case.branch else None
    # As in the network: a layer's vectors are part of all vectors.
    vectors = random(case.batch, 4 * case.width + 16, seed=2, device=device, dtype=dtype)
    shift, scale, gate, _ = vectors[:, 16:].chunk(4, dim=-1)
    weights = random(2, case.width, seed=3, device=device, dtype=dtype) if case.affine else (None, None)

    def run() -> tuple[Tensor, Tensor]:
        return fused_norms.residual_norm(
            x, branch, gate if case.branch else None, *weights, shift, scale, EPS
        )

    total, out = poisoned(run)
    doubles = (None if t is None else t.double() for t in (x, branch, gate, *weights, shift, scale))
    exact, expected = torchs_residual_norm(*doubles, EPS)
    if branch is None:
        assert total is x
    else:
        assert relative_rms(total, exact) <= TOLERANCE[dtype]
    assert (total.dtype, out.dtype, out.is_contiguous()) == (dtype, dtype, True)
    # The sum's own rounding in fp32, of a number so much larger than its deviation.
    assert relative_rms(out, expected) <= TOLERANCE[dtype] + case.mean * 2**-24


def assert_gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    exact: Sequence[Tensor],
    exact_inputs: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Of `outputs` in the direction of random numbers, against float64's."""
    directions = [random(*output.shape, seed=7 + i) for i, output in enumerate(outputs)]
    directions = [d.to(output) for d, output in zip(directions, outputs, strict=True)]
    gradients = poisoned(lambda: torch.autograd.grad(outputs, inputs, directions))
    expected = torch.autograd.grad(exact, exact_inputs, [d.double() for d in directions])
    for tensor, gradient, exact_gradient in zip(inputs, gradients, expected, strict=True):
        assert gradient.dtype == tensor.dtype
        # A token of one channel is a constant after its norm: gradients are 0 but for roundings.
        size = exact_gradient.norm() if exact_gradient.norm() > 1e-3 else 1.0
        assert float((gradient.double() - exact_gradient).norm() / size) <= tolerance


def doubled(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_residual_norm_gradients(
    case: Case, device: str, dtype: torch.dtype, *, x_dtype: torch.dtype = torch.float32
) -> None:
    """x and the weights are fp32, as under autocast, unless `x_dtype` says otherwise."""
    shape = (case.batch, *case.grid, case.width)
    x = (random(*shape, seed=0) + case.mean).to(device, x_dtype).requires_grad_()
    branch = random(*shape, seed=1, device=device, dtype=dtype).requires_grad_() if case.branch else None
    vectors = random(case.batch, 4 * case.width + 16, seed=2, device=device, dtype=dtype).requires_grad_()
    weights = random(2, case.width, seed=3, device=device, dtype=x_dtype) if case.affine else None
    if weights is not None:
        weights.requires_grad_()

    def run(norm: Callable[..., Any], inputs: Sequence[Any]) -> Sequence[Tensor]:
        x, branch, vectors, weights = inputs
        shift, scale, gate, _ = vectors[:, 16:].chunk(4, dim=-1)
        weight, bias = (None, None) if weights is None else weights
        total, out = norm(x, branch, None if branch is None else gate, weight, bias, shift, scale, EPS)
        return (out,) if branch is None else (total, out)

    inputs = (x, branch, vectors, weights)
    exact_inputs = doubled(inputs)
    outputs, exact = run(fused_norms.residual_norm, inputs), run(torchs_residual_norm, exact_inputs)
    assert (outputs[0].dtype, outputs[-1].dtype) == (x_dtype if case.branch else dtype, dtype)
    for output, expected in zip(outputs, exact, strict=True):
        assert relative_rms(output, expected) <= 2 * TOLERANCE[output.dtype] + case.mean * 2**-24
    given = [[t for t in tensors if t is not None] for tensors in (inputs, exact_inputs)]
    assert_gradients(outputs, given[0], exact, given[1], BACKWARD_TOLERANCE[dtype])


def torchs_residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    total = Residual(x, branch, gate).sum()
    normalized = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return total, normalized * (1 + scale[:, None, None]) + shift[:, None, None]


def torchs_gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normalized = F.layer_norm(y.sum(2), weight.shape, weight, bias, EPS)
    return normalized.view_as(z) * F.silu(z)


def assert_gated_norm_gradients(
    width: int, batch: int, num_tokens: int, groups: int, device: str, dtype: torch.dtype
) -> None:
    y = random(batch, num_tokens, groups, width, seed=0, device=device, dtype=dtype).requires_grad_()
    projected = random(batch, num_tokens, 2 * width, seed=1, device=device, dtype=dtype).requires_grad_()
    weights = random(2, width, seed=2, device=device).requires_grad_()
    inputs = (y, projected, weights)
    out = fused_norms.gated_norm(y, projected.chunk(2, dim=-1)[1], *weights, EPS)
    exact_inputs = doubled(inputs)
    exact_y, exact_projected, exact_weights = exact_inputs
    exact = torchs_gated_norm(exact_y, exact_projected.chunk(2, dim=-1)[1], *exact_weights)
    assert_gradients([out], inputs, [exact], exact_inputs, BACKWARD_TOLERANCE[dtype])


def assert_residual_sum_gradients(case: Case, device: str, dtype: torch.dtype) -> None:
    shape = (case.batch, *case.grid, case.width)
    x = random(*shape, seed=0, device=device)
    branch = random(*shape, seed=1, device=device, dtype=dtype)
    gate = random(case.batch, case.width, seed=2, device=device, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (x, branch, gate)]
    exact_inputs = doubled(inputs)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = Residual(*inputs).sum(use_kernels=True)
    exact = Residual(*exact_inputs).sum()
    assert total.dtype == torch.float32
    assert relative_rms(total, exact) <= TOLERANCE[torch.float32]
    assert_gradients([total], inputs, [exact], exact_inputs, BACKWARD_TOLERANCE[dtype])


def assert_gated_norm(
    width: int, batch: int, grid: tuple[int, int], device: str, dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    groups = 1 if y_dtype != dtype else 4  # as scans give y: summed in fp32, or each direction by itself
    y = random(batch, grid[0] * grid[1], groups, width, seed=0, device=device, dtype=y_dtype) + 3
    z = 3 * random(batch, *grid, 2 * width, seed=1, device=device, dtype=dtype).chunk(2, dim=-1)[1]
    z = torch.cat([torch.full_like(z, torch.nan), z], dim=-1).chunk(2, dim=-1)[1]
    weight, bias = random(2, width, seed=2, device=device, dtype=dtype)
    out = poisoned(lambda: fused_norms.gated_norm(y, z, weight, bias, EPS))
    expected = torchs_gated_norm(*(tensor.double() for tensor in (y, z, weight, bias)))
    assert (out.dtype, out.is_contiguous()) == (dtype, True)
    assert relative_rms(out, expected) <= TOLERANCE[dtype]


def assert_resampled_norm(module: Any, x: Tensor) -> None:
    """`module` on the kernels against itself on torch's path in float64, its products left out."""
    module = module.to(x.device, x.dtype)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    module.expand = module.reduction = torch.nn.Identity()
    module.use_kernels = True
    with torch.no_grad():
        out = poisoned(lambda: module(x))
        module.use_kernels = False
        expected = module.double()(x.double())
    assert (out.dtype, out.is_contiguous()) == (x.dtype, True)
    assert relative_rms(out, expected) <= TOLERANCE[x.dtype]


@pytest.mark.usefixtures("interpreted")
@parametrize_cases(CASES)
def test_residual_norm_matches_reference(case: Case) -> None:
    assert_residual_norm(case, "cpu", torch.float32)


@pytest.mark.usefixtures("interpreted")
@parametrize_dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("name", ["width_20", "stage_1", "neither"])
def test_residual_norm_reads_short_dtypes(name: str, dtype: torch.dtype) -> None:
    assert_residual_norm(CASES[name], "cpu", dtype)


@pytest.mark.usefixtures("interpreted")
def test_residual_norm_takes_vectors_however_they_lie() -> None:
    x, branch = random(2, 2, 2, 8, seed=0), random(2, 2, 2, 8, seed=1)
    shift, scale, gate = random(3, 2, 8, seed=2)
    expected = fused_norms.residual_norm(x, branch, gate, None, None, shift, scale, EPS)
    transposed = gate.t().contiguous().t()
    row = shift[:1].expand(2, -1)
    out = fused_norms.residual_norm(x, branch, transposed, None, None, shift, scale, EPS)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    _, out_of_row = fused_norms.residual_norm(x, branch, gate, None, None, row, scale, EPS)
    assert torch.equal(out_of_row[0], expected[1][0])


@pytest.mark.usefixtures("interpreted")
def test_residual_norm_takes_numbers_of_several_dtypes() -> None:
    """As under autocast, where x and the weights are fp32, and what comes out of a product is bf16."""
    x, branch = random(2, 2, 2, 8, seed=0), random(2, 2, 2, 8, seed=1).bfloat16()
    shift, scale, gate = random(3, 2, 8, seed=2).bfloat16()
    weight, bias = random(2, 8, seed=3)
    outputs = fused_norms.residual_norm(x, branch, gate, weight, bias, shift, scale, EPS)
    norm = ResidualNorm(8, eps=EPS)
    norm.load_state_dict({"weight": weight, "bias": bias})
    doubles = [tensor.double() for tensor in (x, branch, gate, shift, scale)]
    expected = norm.double()(Residual(*doubles[:3]), *doubles[3:])
    for value, exact, dtype in zip(outputs, expected, (torch.float32, torch.bfloat16), strict=True):
        assert value.dtype == dtype
        assert relative_rms(value, exact) <= (1 if dtype == torch.float32 else 2) * TOLERANCE[dtype]


@pytest.mark.usefixtures("interpreted")
@parametrize_dtypes(torch.float32, torch.bfloat16)
@parametrize_cases(CASES)
def test_residual_norm_has_the_references_gradients(case: Case, dtype: torch.dtype) -> None:
    assert_residual_norm_gradients(case, "cpu", dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["width_20", "no_branch"])
def test_residual_norm_has_the_references_gradients_in_bf16_alone(name: str) -> None:
    assert_residual_norm_gradients(CASES[name], "cpu", torch.bfloat16, x_dtype=torch.bfloat16)


@pytest.mark.usefixtures("interpreted")
@parametrize_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("name", ["width_7", "stage_1", "one_token"])
def test_residual_sum_has_the_references_gradients(name: str, dtype: torch.dtype) -> None:
    assert_residual_sum_gradients(CASES[name], "cpu", dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("groups", [1, 4])
@parametrize_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize(("width", "num_tokens"), [(1, 6), (7, 9), (40, 15), (640, 6), (2560, 2)])
def test_gated_norm_has_the_references_gradients(
    width: int, num_tokens: int, dtype: torch.dtype, groups: int
) -> None:
    assert_gated_norm_gradients(width, 2, num_tokens, groups, "cpu", dtype)


@pytest.mark.usefixtures("interpreted")
def test_gradients_are_the_same_however_many_programs_share_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(width=7, batch=1, grid=(5, 60))
    monkeypatch.setattr(fused_norms, "BACKWARD_PROGRAMS", 1)
    for tokens in (64, 512):  # of a program
        monkeypatch.setattr(fused_norms, "MAX_TOKENS_A_PART", tokens)
        assert_residual_norm_gradients(case, "cpu", torch.float32)
        assert_gated_norm_gradients(7, 1, 300, 4, "cpu", torch.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("width", "grid"), [(1, (2, 3)), (7, (3, 3)), (40, (3, 5)), (640, (2, 3)), (2560, (1, 2))]
)
@pytest.mark.parametrize(
    ("dtype", "y_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16_after_fp32"],
)
def test_gated_norm_matches_reference(
    width: int, grid: tuple[int, int], dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    assert_gated_norm(width, 2, grid, "cpu", dtype, y_dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("width", [1, 5, 20, 96])
def test_resampled_norms_match_reference(width: int) -> None:
    assert_resampled_norm(PatchMerging(width, 1), random(2, 4, 6, width, seed=0))
    for factor in (1, 2, 3):
        expanding = PatchExpanding(1, width, factor=factor)
        assert_resampled_norm(expanding, random(2, 3, 2, factor**2 * width, seed=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_norms_reject_dtypes_they_cannot_read(dtype: torch.dtype) -> None:
    x, vector = torch.zeros(1, 2, 2, 8), torch.zeros(1, 8)
    with pytest.raises(ValueError, match=f"scale: {dtype} given"):
        fused_norms.residual_norm(x, None, None, None, None, vector, vector.to(dtype), EPS)
    with pytest.raises(ValueError, match=f"gate: {dtype} given"):
        fused_norms.residual_sum(x, x, vector.to(dtype))
    with pytest.raises(ValueError, match=f"y: {dtype} given"):
        fused_norms.gated_norm(x.to(dtype), x, vector[0], vector[0], EPS)
    with pytest.raises(ValueError, match=f"x: {dtype} given"):
        fused_norms.merged_norm(x.to(dtype), vector[0], vector[0], EPS, factor=2)


def test_kernels_without_a_backward_run_only_where_nobody_needs_it() -> None:
    assert not fused_norms.kernels_run(True)
    assert fused_norms.norms_run(True)
    assert not fused_norms.norms_run(False)
    with torch.no_grad():
        assert fused_norms.kernels_run(True)
        assert not fused_norms.kernels_run(False)
    with torch.inference_mode():
        assert fused_norms.kernels_run(True)


def test_feed_forward_off_cuda_is_exact_whoever_runs_it() -> None:
    torch.manual_seed(0)
    module, x = FeedForward(8), torch.randn(2, 3, 3, 8)
    expected = module(x)
    module.use_kernels = True
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@pytest.mark.usefixtures("interpreted")
def test_norms_have_the_shapes_that_the_compiler_is_told() -> None:
    """The operators' fakes against what they return."""
    x, vectors, (weight, bias) = random(2, 4, 4, 8, seed=0), random(2, 24, seed=1), random(2, 8, seed=2)
    shift, scale, gate = vectors.chunk(3, dim=-1)
    ops = torch.ops.lamamba
    for branch in (x, None):
        arguments = (x, branch, gate if branch is x else None, weight, bias, shift, scale, EPS)
        torch.library.opcheck(ops.residual_norm, arguments, test_utils=("test_schema", "test_faketensor"))
    z, groups = x.chunk(2, dim=-1)[1], x.unflatten(-1, (2, 4))
    for op, arguments in (
        (ops.gated_norm, (groups, z, weight[:4], bias[:4], EPS, True)),
        (ops.gated_norm, (groups[..., :1, :].contiguous(), z, weight[:4], bias[:4], EPS, True)),
        (ops.gated_norm_backward, (z, z, weight[:4], bias[:4], z, EPS)),
        (ops.residual_norm_backward, (x, x, gate, weight, scale, x, x, EPS)),
        (ops.residual_norm_backward, (x, None, None, None, scale, None, x, EPS)),
        (ops.residual_norm_backward, (None, x, gate, None, None, x, None, EPS)),
        (ops.resampled_norm, (x[..., :2], weight, bias, EPS, 2, True)),
        (ops.resampled_norm, (x, weight[:2], bias[:2], EPS, 2, False)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


PLAIN = ScanBackend("plain", vectorized.selective_scan)
KERNELS = ScanBackend("kernels", vectorized.selective_scan, kernels=True)


@pytest.fixture
def network() -> LaMambaDiff:
    torch.manual_seed(0)
    network = LaMambaDiff(**dataclasses.asdict(SMALL_NETWORK)).eval()
    for name, parameter in network.named_parameters():
        if ".modulation." in name or "norm" in name or name.endswith("relative_position_bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def _inputs(*size: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(2, 4, *size, seed=5), torch.tensor([0.0, 700.5]), torch.tensor([0, 5])


@pytest.fixture
def no_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and convolution, which have kernels and tests of their own, are torch's."""

    def conv3x3_silu(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        u = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
        return F.silu(u).permute(0, 2, 3, 1)

    monkeypatch.setattr(window_attention, "accepts", lambda *_: False)
    monkeypatch.setattr(depthwise_conv, "conv3x3_silu", conv3x3_silu)


@pytest.mark.usefixtures("interpreted", "no_other_kernels")
def test_network_with_kernels_equals_the_network_on_torchs_path(
    network: LaMambaDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        expected = network(*_inputs(16, 8)).sample
        network.use_scan_backend(KERNELS)
        torchs_norms = Mock(side_effect=F.layer_norm)
        monkeypatch.setattr(F, "layer_norm", torchs_norms)
        out = network(*_inputs(16, 8)).sample
    assert torchs_norms.call_count == 1  # the patch embedding's
    assert relative_rms(out, expected.double()) < 2e-5  # as another batch size makes


@pytest.mark.usefixtures("interpreted", "no_other_kernels")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, in tracing
def test_network_with_kernels_trains_as_on_torchs_path(network: LaMambaDiff) -> None:
    """Outputs and the gradients of all parameters, in fp32; checkpointed, and one block traced."""
    results = []
    for backend in (PLAIN, KERNELS):
        network.use_scan_backend(backend)
        network.zero_grad()
        if backend is KERNELS:
            network.enable_gradient_checkpointing()
            network.encoder[0][1].compile(backend="aot_eager", dynamic=False, fullgraph=True)
        sample = network(*_inputs(8, 8)).sample
        sample.square().mean().backward()
        results.append([sample, *(parameter.grad for parameter in network.parameters())])
    for value, expected in zip(*results, strict=True):
        assert value is not None
        assert relative_rms(value, expected.double()) < 2e-5  # roundings of fp32 through the whole network


@pytest.mark.usefixtures("interpreted", "no_other_kernels")
def test_network_with_kernels_trains_under_autocast_as_exactly_as_on_torchs_path(
    network: LaMambaDiff,
) -> None:
    """Errors of all gradients together, against fp32: the interpreter's bf16 doubles those of the kernels."""
    gradients = []
    for backend, autocast in ((PLAIN, False), (PLAIN, True), (KERNELS, True)):
        network.use_scan_backend(backend)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sample = network(*_inputs(8, 8)).sample
        sample.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    exact, torchs, kernels = gradients
    assert relative_rms(kernels, exact.double()) < 2 * relative_rms(torchs, exact.double())


@pytest.mark.gpu
@cuda
@parametrize_dtypes(*TOLERANCE)
@parametrize_cases(GPU_CASES)
def test_residual_norm_matches_reference_on_cuda(case: Case, dtype: torch.dtype) -> None:
    assert_residual_norm(case, "cuda", dtype)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("y_dtype", [None, torch.float32], ids=["like_z", "fp32"])
@parametrize_dtypes(*TOLERANCE)
@pytest.mark.parametrize("batch", [1, 2, 128])
@pytest.mark.parametrize(("width", "side"), [(640, 32), (1280, 16), (2560, 8), (5120, 4), (40, 5), (7, 3)])
def test_gated_norm_matches_reference_on_cuda(
    width: int, side: int, batch: int, dtype: torch.dtype, y_dtype: torch.dtype | None
) -> None:
    assert_gated_norm(width, batch, (side, side), "cuda", dtype, y_dtype or dtype)


@pytest.mark.gpu
@cuda
@parametrize_dtypes(*TOLERANCE)
@parametrize_cases(GPU_CASES)
def test_residual_norm_has_the_references_gradients_on_cuda(case: Case, dtype: torch.dtype) -> None:
    assert_residual_norm_gradients(case, "cuda", dtype)
    assert_residual_norm_gradients(case, "cuda", dtype, x_dtype=dtype)
    if case.branch:
        assert_residual_sum_gradients(case, "cuda", dtype)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("groups", [1, 4])
@parametrize_dtypes(*TOLERANCE)
@pytest.mark.parametrize("batch", [1, 2, 128])
@pytest.mark.parametrize(
    ("width", "num_tokens"), [(640, 1024), (1280, 256), (2560, 64), (5120, 16), (528, 64), (40, 25), (7, 9)]
)
def test_gated_norm_has_the_references_gradients_on_cuda(
    width: int, num_tokens: int, batch: int, dtype: torch.dtype, groups: int
) -> None:
    assert_gated_norm_gradients(width, batch, num_tokens, groups, "cuda", dtype)


@pytest.mark.gpu
@cuda
@parametrize_dtypes(*TOLERANCE)
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize(("width", "side"), [(320, 32), (640, 16), (1280, 8), (5, 6)])
def test_resampled_norms_match_reference_on_cuda(
    width: int, side: int, batch: int, dtype: torch.dtype
) -> None:
    x = random(batch, side, side, width, seed=0, device="cuda", dtype=dtype)
    assert_resampled_norm(PatchMerging(width, 1), x)
    for factor in (1, 2):
        expanded = random(batch, side // 2, side // 2, factor**2 * width, seed=0, device="cuda", dtype=dtype)
        assert_resampled_norm(PatchExpanding(1, width, factor=factor), expanded)


@pytest.mark.gpu
@cuda
@parametrize_dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize(("width", "side"), [(320, 32), (1280, 8)])
def test_gelu_in_the_products_epilogue_is_gelu(width: int, side: int, dtype: torch.dtype) -> None:
    """To the tanh form's 5e-4 of results of size 1, and the result's one rounding."""
    linear = torch.nn.Linear(width, 4 * width, device="cuda", dtype=dtype)
    x = random(2, side, side, width, seed=0, device="cuda", dtype=dtype)
    with torch.inference_mode():
        out = fused_norms.linear_gelu(x, linear.weight, linear.bias)
        expected = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()))
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, (2, side, side, 4 * width), True)
    assert (out - expected).abs().max() <= 5e-4 + TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.gpu
@cuda
def test_network_replays_as_a_cuda_graph(network: LaMambaDiff) -> None:
    network = network.cuda().bfloat16()
    network.use_scan_backend(KERNELS)
    latents, timesteps, labels = (tensor.cuda() for tensor in _inputs(8, 8))
    held = torch.zeros_like(latents, dtype=torch.bfloat16)
    with torch.inference_mode():
        conditioning = network.conditioning(timesteps, labels)
        network(held, conditioning=conditioning)  # compiles the kernels, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = network(held, conditioning=conditioning).sample
        held.copy_(latents)
        graph.replay()
        assert torch.equal(out, network(held, conditioning=conditioning).sample)
