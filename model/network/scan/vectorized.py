"""Selective scan without a loop over tokens, for CPUs (and for any device without a kernel).

The recurrence h_l = a_l h_{l-1} + b_l is solved by odd-even reduction: two neighbouring steps compose to one,
(a_1, b_1) then (a_2, b_2) = (a_1 a_2, a_2 b_1 + b_2), so the odd steps form a recurrence of half the length,
and the even states follow from the odd ones. All a lie in (0, 1]: products can underflow to 0, which is the
right limit, but never overflow, whatever delta*A is; nothing is divided and no logarithm is summed. About 3 L
multiply-adds a channel, in log2(L) rounds of whole-tensor operations.

All directions run in the same rounds: what depends on a token is computed in the order of the grid and moved
onto the paths of all of them by one gather of rows of d_inner numbers.

The gradient is the same recurrence run backwards: with g_l = dL/dh_l in all, g_l = dy_l + a_{l+1} g_{l+1},
and then dL/db_l = g_l, dL/da_l = g_l h_{l-1}.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.scan.reference import project_dt


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
    """Same arguments, result and precision as `reference.selective_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = project_dt(dt, dt_proj_weight)  # (batch, length, directions, d_inner)
    u, delta, B, C = (tensor.to(dtype) for tensor in (u, delta, B, C))
    A, rows = -torch.exp(A_log.to(dtype)), _rows_along(paths)
    step = F.softplus(delta + delta_bias)
    step_u = _ToPath.apply(step * u.unsqueeze(2), rows)  # (batch, path_length, directions, d_inner)
    step, B, C = (_ToPath.apply(x, rows) for x in (step, B, C))
    y = torch.zeros_like(step)
    # State by state: no tensor has both axes d_inner and d_state, which would leave the caches.
    for A_n, B_n, C_n in zip(A.unbind(-1), B.split(1, -1), C.split(1, -1), strict=True):
        y = torch.addcmul(y, linear_recurrence(torch.exp(step * A_n), step_u * B_n), C_n)
    skip = torch.matmul(_visits(paths, u.shape[1], dtype), D.to(dtype)) * u  # (batch, length, d_inner)
    return (_ToGrid.apply(y, rows, u.shape[1]).sum(2) + skip).unsqueeze(2)


def linear_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h with h_l = a_l h_{l-1} + b_l along axis 1 from h = 0; a, b and h `(batch, length, ...)`;
    differentiable.
    """
    return _LinearRecurrence.apply(a, b)


def _rows_along(paths: Tensor) -> Tensor:
    """`(path_length * directions,)`: the rows of a `(length * directions, ...)` tensor, step by step."""
    directions = len(paths)
    return (paths * directions + torch.arange(directions, device=paths.device).unsqueeze(1)).T.flatten()


def _visits(paths: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`(length, directions)`: 1 where the direction visits the token."""
    visits = torch.zeros(len(paths), length, dtype=dtype, device=paths.device)
    return visits.scatter_(1, paths, 1.0).T


class _ToPath(torch.autograd.Function):
    """`(batch, length, directions, ...)` in the order of the grid to that of the paths."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = x.shape[1]
        return _to_path(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _to_grid(grad, rows, ctx.length), None


class _ToGrid(torch.autograd.Function):
    """The way back; zeros at tokens that a direction does not visit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _to_grid(x, rows, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _to_path(grad, rows), None, None


def _to_path(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(1, 2).index_select(1, rows).unflatten(1, (-1, x.shape[2]))


def _to_grid(x: Tensor, rows: Tensor, length: int) -> Tensor:
    size, directions = length * x.shape[2], x.shape[2]
    x = x.flatten(1, 2)
    if len(rows) == size:  # every token visited: a permutation, and reading rows is faster than writing them
        grid = x.index_select(
            1, torch.empty_like(rows).scatter_(0, rows, torch.arange(size, device=x.device))
        )
    else:
        grid = x.new_zeros(len(x), size, x.shape[2]).index_copy_(1, rows, x)
    return grid.unflatten(1, (length, directions))


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = _solve_(a, b.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        # a_{l+1} in reversed order; the first factor meets g = 0 and is never used.
        a_next = torch.cat([a[:, :1], a[:, 1:].flip(1)], dim=1)
        grad_b = _solve_(a_next, grad_h.flip(1)).flip(1)
        h_previous = F.pad(h, (0, 0) * (h.dim() - 2) + (1, -1))
        return grad_b * h_previous, grad_b


def _solve_(a: Tensor, h: Tensor) -> Tensor:
    """Turn b, which `h` holds, into the states along axis 1, in place."""
    length = h.shape[1]
    pairs = length // 2
    if pairs == 0:
        return h
    a_even, a_odd, h_odd = a[:, 0 : 2 * pairs : 2], a[:, 1::2], h[:, 1::2]
    h_odd.addcmul_(a_odd, h[:, 0 : 2 * pairs : 2])
    if pairs > 1:
        _solve_(a_even * a_odd, h_odd)
    h[:, 2::2].addcmul_(a[:, 2::2], h_odd[:, : (length - 1) // 2])
    return h
