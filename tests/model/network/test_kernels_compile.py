"""Each kernel, in each form that it is launched in, compiles for an H100.

Triton's interpreter runs what its compiler rejects: without a GPU, only this finds that out. The compiler
needs none. What it makes of a kernel is tested by the `gpu` tests beside the kernels.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from model.diffusion import noise, noise_kernels
from model.network import (
    depthwise_conv,
    depthwise_conv_kernels,
    fused_norms,
    fused_norms_kernels,
    window_attention,
    window_attention_kernels,
)
from model.network.scan import triton_kernels, triton_scan
from model.network.scan.paths import scan_paths
from tests.triton_compiler import compile_launches

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def compiled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import JITFunction

    if not isinstance(triton_kernels.selective_scan_fwd_kernel, JITFunction):
        pytest.skip("TRITON_INTERPRET is set, and Triton does not compile")
    for module in (
        triton_kernels,
        window_attention_kernels,
        depthwise_conv_kernels,
        fused_norms_kernels,
        noise_kernels,
    ):
        compile_launches(module, monkeypatch)


def scan_inputs(
    batch: int, side: int, d_inner: int, d_state: int, dtype: torch.dtype, vssm: str = "ss2d_continuous"
) -> list[Tensor]:
    """Of `triton_scan.selective_scan`; dt, B and C are parts of one projection, as in the network."""
    paths, rank = scan_paths(vssm, side, side), d_inner // 32
    directions, length = len(paths), side**2
    projected = torch.zeros(batch, length, directions, rank + 2 * d_state, dtype=dtype)
    dt, B, C = projected.split((rank, d_state, d_state), dim=-1)
    u = torch.zeros(batch, length, 2 * d_inner, dtype=dtype)[..., :d_inner]
    per_channel = [torch.zeros(directions, d_inner) for _ in range(2)]
    weight = torch.zeros(directions, d_inner, rank, dtype=dtype)
    return [u, dt, weight, torch.zeros(directions, d_inner, d_state), B, C, *per_channel, paths]


@pytest.mark.parametrize(
    ("batch", "side", "d_inner", "d_state", "dtype"),
    [
        (1, 16, 640, 1, DTYPE),
        (2, 8, 2560, 1, DTYPE),
        (1, 5, 40, 1, DTYPE),
        (1, 4, 96, 3, DTYPE),
        (1, 16, 640, 1, torch.float32),
    ],
    ids=["chunks", "rank_80", "uneven", "three_states", "fp32"],
)
def test_selective_scan_compiles(
    batch: int, side: int, d_inner: int, d_state: int, dtype: torch.dtype
) -> None:
    inputs = scan_inputs(batch, side, d_inner, d_state, dtype)
    triton_scan._forward(*inputs, save_states=False)
    _, states = triton_scan._forward(*inputs, save_states=True)
    triton_scan._backward(*inputs, states, torch.zeros_like(inputs[0], dtype=torch.float32))


def test_selective_scan_with_wide_tiles_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "FILLING_PROGRAMS", 1)
    inputs = scan_inputs(1, 8, 640, 1, DTYPE)
    _, states = triton_scan._forward(*inputs, save_states=True)
    triton_scan._backward(*inputs, states, torch.zeros_like(inputs[0], dtype=torch.float32))


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("head_dim", [20, 80])
def test_window_attention_compiles(head_dim: int, qk_norm: bool) -> None:
    qkv = torch.zeros(1, 16, 16, 3 * 16 * head_dim, dtype=DTYPE)
    norm_weight = torch.ones(2, head_dim, dtype=DTYPE) if qk_norm else None
    arguments: tuple[Any, ...] = (qkv, torch.zeros(225, 16, dtype=DTYPE), norm_weight)
    window, shift = (8, 8), (4, 4)
    out = window_attention._forward(*arguments, window, shift)
    window_attention._backward(*arguments, out, window, shift)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_depthwise_conv_compiles(has_bias: bool) -> None:
    u = torch.zeros(2, 8, 8, 1280, dtype=DTYPE)[..., :640]
    bias = torch.zeros(640, dtype=DTYPE) if has_bias else None
    weight = torch.zeros(640, 1, 3, 3, dtype=DTYPE)
    out = depthwise_conv._forward(u, weight, bias)
    depthwise_conv._backward(u, weight, bias, out)


@pytest.mark.parametrize("width", [320, 5120])
def test_norms_compile(width: int) -> None:
    x, vectors = torch.zeros(1, 4, 4, width, dtype=DTYPE), torch.zeros(1, 3 * width, dtype=DTYPE)
    weight, bias = torch.zeros(2, width, dtype=DTYPE)
    shift, scale, gate = vectors.chunk(3, dim=-1)
    fused_norms.residual_norm(x, x, gate, weight, bias, shift, scale, 1e-5)
    fused_norms.residual_norm(x, None, None, None, None, shift, scale, 1e-5)
    # Under autocast x and the weights are fp32.
    wide, weights = x.float(), (weight.float(), bias.float())
    fused_norms.residual_norm(wide, x, gate, *weights, shift, scale, 1e-5)
    fused_norms._residual_norm_backward(wide, x, gate, weights[0], scale, wide, x, 1e-5)
    fused_norms._residual_norm_backward(x, x, gate, weight, scale, x, x, 1e-5)
    fused_norms._residual_sum(wide, x, gate)
    fused_norms._residual_norm_backward(wide, None, None, None, scale, None, x, 1e-5)
    fused_norms._residual_norm_backward(None, x, gate, None, None, wide, None, 1e-5)
    z = torch.zeros(1, 4, 4, 2 * width, dtype=DTYPE).chunk(2, dim=-1)[1]
    for groups, y_dtype in ((4, DTYPE), (1, torch.float32)):
        y = torch.zeros(1, 16, groups, width, dtype=y_dtype)
        fused_norms.gated_norm(y, z, weight, bias, 1e-5)
        _, total = fused_norms._gated_norm(y, z, *weights, 1e-5, True)
        fused_norms._gated_norm_backward(total if groups > 1 else y, z, *weights, z, 1e-5)


@pytest.mark.parametrize("count", [4 * 32 * 32, 105])
def test_noise_compiles(count: int) -> None:
    images = torch.zeros(2, dtype=torch.int64)
    noise._noise_by_kernel(images, images, images, count)
