"""Selective scan without a loop over tokens, for CPUs (and for any device without a kernel).

The recurrence h_l = a_l h_{l-1} + b_l is solved by odd-even reduction: two neighbouring steps compose to one,
(a_1, b_1) then (a_2, b_2) = (a_1 a_2, a_2 b_1 + b_2), so the odd steps form a recurrence of half the length,
and the even states follow from the odd ones. All a lie in (0, 1]: products can underflow to 0, which is the
right limit, but never overflow, whatever delta*A is; nothing is divided and no logarithm is summed. About 3 L
multiply-adds a channel, in log2(L) rounds of whole-tensor operations.

The gradient is the same recurrence run backwards: with g_l = dL/dh_l in all, g_l = dy_l + a_{l+1} g_{l+1},
and then dL/db_l = g_l, dL/da_l = g_l h_{l-1}.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    paths: Tensor,
) -> Tensor:
    """Same arguments, result and precision as `reference.selective_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C = (tensor.to(dtype) for tensor in (u, delta, B, C))
    dt = F.softplus(delta + delta_bias)  # (batch, length, directions, d_inner)
    skip = (u.unsqueeze(2) * D).unbind(2)
    y = torch.zeros_like(u)
    for k, path in enumerate(paths):
        dt_k, u_k = dt[:, path, k], u[:, path]  # (batch, path_length, d_inner)
        B_k, C_k = B[:, path, k], C[:, path, k]  # (batch, path_length, d_state)
        if A.shape[-1] == 1:
            # One state a channel: no state axis, and the products with B and C broadcast over the channels.
            h = linear_recurrence(torch.exp(dt_k * A[k, :, 0]), dt_k * u_k * B_k)
            y_k = h * C_k
        else:
            decay = torch.exp(dt_k.unsqueeze(-1) * A[k])  # (batch, path_length, d_inner, d_state)
            h = linear_recurrence(decay, (dt_k * u_k).unsqueeze(-1) * B_k.unsqueeze(2))
            y_k = (h * C_k.unsqueeze(2)).sum(-1)
        y = y.index_add(1, path, y_k + skip[k][:, path])
    return y


def linear_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h with h_l = a_l h_{l-1} + b_l along axis 1 from h = 0; a, b and h `(batch, length, ...)`;
    differentiable.
    """
    return _LinearRecurrence.apply(a, b)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = _solve(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        # a_{l+1} in reversed order; the first factor meets h = 0 and is never used.
        a_next = torch.cat([a[:, :1], a[:, 1:].flip(1)], dim=1)
        grad_b = _solve(a_next, grad_h.flip(1)).flip(1)
        h_previous = F.pad(h, (0, 0) * (h.dim() - 2) + (1, -1))
        return grad_b * h_previous, grad_b


def _solve(a: Tensor, b: Tensor) -> Tensor:
    length = b.shape[1]
    if length == 1:
        return b
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    a_odd, b_odd = a[:, 1::2], b[:, 1::2]
    pairs = a_odd.shape[1]
    h_odd = _solve(a[:, 0 : 2 * pairs : 2] * a_odd, torch.addcmul(b_odd, a_odd, b[:, 0 : 2 * pairs : 2]))
    h[:, 1::2] = h_odd
    h[:, 0] = b[:, 0]
    h[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], h_odd[:, : (length - 1) // 2])
    return h
