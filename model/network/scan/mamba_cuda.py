"""Selective scan through mamba-ssm's CUDA kernels, the ones that the released code runs on.

The kernels (extension `selective_scan_cuda` of the package mamba-ssm, 2.3) want channels first, in scan
order. So the directions become their groups: u and delta are gathered by path to `(batch, directions *
d_inner, path_length)`, B and C to `(batch, directions, d_state, path_length)`, and the output is put back to
its tokens and summed. Bias and softplus are in the kernel. Its rules: u, delta, B and C of one dtype (fp32,
bf16 or fp16), A, D and delta_bias fp32, d_state at most 256. Sequences are cut in chunks of 2048 steps, whose
states the forward returns and the backward reads. The gradients of A, B, C, D and delta_bias are summed by
atomic additions: they vary in their last bits between runs.

Only the extension is imported: the package around it loads much that nobody here needs.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from model.network.scan.reference import project_dt
from model.network.triton_jit import needs_gradient

EXTENSION = "selective_scan_cuda"
CHUNK = 2048
MAX_STATE = 256


def is_available(device: torch.device | str) -> bool:
    """Whether `device` is a CUDA device and mamba-ssm's extension is installed."""
    return (
        torch.device(device).type == "cuda" and torch.cuda.is_available() and find_spec(EXTENSION) is not None
    )


@cache
def _extension() -> ModuleType:
    return import_module(EXTENSION)


def _gather(tensor: Tensor, paths: Tensor) -> Tensor:
    """Into scan order: `(batch, length, directions, n)` to `(batch, directions, n, path_length)`."""
    directions = torch.arange(len(paths), device=paths.device).unsqueeze(1)
    return tensor[:, paths, directions].transpose(2, 3).contiguous()


def _scatter(tensor: Tensor, paths: Tensor, length: int) -> Tensor:
    """The inverse of `_gather`; zeros where a direction does not visit a token."""
    batch, directions, n, _ = tensor.shape
    index = torch.arange(directions, device=paths.device).unsqueeze(1)
    tokens = tensor.new_zeros((batch, length, directions, n))
    tokens[:, paths, index] = tensor.transpose(2, 3)
    return tokens


def _kernel_inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, paths: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    u_tokens = u.unsqueeze(2).expand(-1, -1, len(paths), -1)
    return (
        _gather(u_tokens, paths).flatten(1, 2),
        _gather(delta.to(u.dtype), paths).flatten(1, 2),
        A.flatten(0, 1),
        _gather(B.to(u.dtype), paths),
        _gather(C.to(u.dtype), paths),
        D.flatten(),
        delta_bias.flatten(),
    )


@torch.library.custom_op("lamamba::mamba_scan_forward", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """y `(batch, directions * d_inner, path_length)` and the chunks' states, of inputs in scan order."""
    y, states, *_ = _extension().fwd(u, delta, A, B, C, D, None, delta_bias, True)
    return y, states


@_forward.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    (batch, channels, path_length), d_state = u.shape, A.shape[1]
    chunks = (path_length + CHUNK - 1) // CHUNK
    return torch.empty_like(u), A.new_empty((batch, channels, chunks, 2 * d_state))


@torch.library.custom_op("lamamba::mamba_scan_backward", mutates_args=())
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `_forward`, in scan order."""
    gradients = _extension().bwd(u, delta, A, B, C, D, None, delta_bias, dy, states, None, None, True, False)
    du, ddelta, dA, dB, dC, dD, dbias, *_ = gradients
    return du, ddelta, dA, dB, dC, dD, dbias


@_backward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta, dA, dB, dC, dD, dbias = (
        torch.empty_like(tensor) for tensor in (u, delta, A, B, C, D, delta_bias)
    )
    return du, ddelta, dA, dB, dC, dD, dbias


class _SelectiveScan(torch.autograd.Function):
    """Keeps the tokens as given and gathers them again in the backward: a quarter of the memory."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y, states = _forward(*_kernel_inputs(*inputs))
        ctx.save_for_backward(*inputs, states)
        return _merge(y, inputs[0], inputs[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, paths, states = ctx.saved_tensors
        length, (directions, d_inner, _) = u.shape[1], A.shape
        dy = grad_y.to(u.dtype).expand(-1, -1, directions, -1)
        dy = _gather(dy, paths).flatten(1, 2)
        inputs = _kernel_inputs(u, delta, A, B, C, D, delta_bias, paths)
        du, ddelta, dA, dB, dC, dD, dbias = _backward(*inputs, states, dy)
        du, ddelta = (tensor.unflatten(1, (directions, d_inner)) for tensor in (du, ddelta))
        return (
            _scatter(du, paths, length).sum(2, dtype=torch.float32).to(u.dtype),
            _scatter(ddelta, paths, length).to(delta.dtype),
            dA.view_as(A),
            _scatter(dB, paths, length).to(B.dtype),
            _scatter(dC, paths, length).to(C.dtype),
            dD.view_as(D),
            dbias.view_as(delta_bias),
            None,
        )


def _merge(y: Tensor, u: Tensor, paths: Tensor) -> Tensor:
    """The directions' y at their tokens, summed in fp32: `(batch, length, 1, d_inner)`."""
    y = rearrange(y, "b (k c) l -> b k c l", k=len(paths))
    return _scatter(y, paths, u.shape[1]).sum(2, keepdim=True, dtype=torch.float32)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    dt_proj_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
) -> Tensor:
    """Same arguments and result as `reference.selective_scan`, for fp32, bf16 and fp16 inputs; fp32 inside.

    Each direction's y is stored in u's dtype before the sum over directions, which is fp32.

    Raises ValueError for more states than the kernels hold.
    """
    if A_log.shape[2] > MAX_STATE:
        raise ValueError(f"d_state: {A_log.shape[2]} given; mamba-ssm's kernels accept 1 to {MAX_STATE}")
    A, D, delta_bias = -torch.exp(A_log.float()), D.float(), delta_bias.float()
    delta = project_dt(dt, dt_proj_weight)
    inputs = (u, delta, A, B, C, D, delta_bias, paths)
    if needs_gradient(*inputs):
        return _SelectiveScan.apply(*inputs)
    y, _ = _forward(*_kernel_inputs(*inputs))
    return _merge(y, u, paths)
