"""Selective scan, written to be read: the recurrence of Mamba (Gu & Dao 2023, algorithm 2) as a loop over
tokens.

Per direction k, channel and state, with token l the one that the path visits at its step, from h = 0:

    step = softplus(dt_proj_weight @ dt_l + delta_bias)
    h    = exp(step * A) * h + step * B_l * u_l,   A = -exp(A_log)
    y_l  = y_l + sum_n C_l[n] * h[n] + D * u_l

This is the oracle of every other backend and of the gradients (autograd through the loop). It computes in
fp32, in float64 for float64 inputs, and needs `path_length` sequential steps: too slow to serve with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Each token's scan output, `(batch, length, groups, d_inner)`: what groups of directions add up to.

    Their sum over the groups is y. It is left to whoever reads it, who should take it in fp32: a backend may
    give one group in fp32, as this one does (float64 if given), or more in u's dtype. Gradients are those of
    the sum: a backend may take one group's for that of all.

    Args:
        u: `(batch, length, d_inner)`, tokens in row-major order (no backend wants them permuted).
        dt: `(batch, length, directions, rank)`, the step size's low-rank form.
        dt_proj_weight: `(directions, d_inner, rank)`, which projects it to the channels.
        A_log: `(directions, d_inner, d_state)`; A = -exp(A_log), so that states decay.
        B, C: `(batch, length, directions, d_state)`, shared by the channels of a direction.
        D: `(directions, d_inner)`.
        delta_bias: `(directions, d_inner)`.
        paths: `(directions, path_length)` int64, as `paths.scan_paths` makes them. A token that no step of a
            direction visits gets nothing from that direction.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = project_dt(dt, dt_proj_weight)
    u, delta, B, C = (tensor.to(dtype) for tensor in (u, delta, B, C))
    A = -torch.exp(A_log.to(dtype))
    y = torch.zeros_like(u)
    for k, path in enumerate(paths):
        step_size = F.softplus(delta[:, path, k] + delta_bias[k])  # (batch, path_length, d_inner)
        u_k, B_k, C_k = u[:, path], B[:, path, k], C[:, path, k]
        h = u.new_zeros(*u_k[:, 0].shape, A.shape[-1])  # (batch, d_inner, d_state)
        outputs = []
        for i in range(len(path)):
            input_term = (step_size[:, i] * u_k[:, i]).unsqueeze(-1) * B_k[:, i].unsqueeze(1)
            h = torch.exp(step_size[:, i].unsqueeze(-1) * A[k]) * h + input_term
            outputs.append((h * C_k[:, i].unsqueeze(1)).sum(-1) + D[k] * u_k[:, i])
        y = y.index_add(1, path, torch.stack(outputs, dim=1))
    return y.unsqueeze(2)


def project_dt(dt: Tensor, dt_proj_weight: Tensor) -> Tensor:
    """delta, the step sizes before bias and softplus: `(batch, length, directions, d_inner)`.

    In dt's dtype, which autocast may have chosen while the weight is a parameter in fp32.
    """
    return torch.einsum("blkr,kdr->blkd", dt, dt_proj_weight.to(dt.dtype))
