"""If this fails, tokens attend to other tokens, or with another bias, than the weights were trained with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.network.attention import WindowAttention
from model.network.geometry import GridGeometry

HEADS, WIDTH = 2, 6
CASES = {  # grid, window size, shifted
    "one-window": ((4, 4), 4, False),
    "odd-block-of-one-window": ((4, 4), 4, True),
    "grid-smaller-than-the-window": ((3, 2), 4, True),
    "unshifted": ((8, 4), 4, False),
    "shifted": ((8, 8), 4, True),
    "shifted-along-one-axis": ((4, 12), 4, True),
    "odd-window": ((9, 6), 3, True),
}


def geometry_of(grid: tuple[int, int], window_size: int, attention: str = "shifted_window") -> GridGeometry:
    return GridGeometry(
        *grid, vssm="ss2d", scan_window_size=1, attention=attention, window_size=window_size
    ).double()


def attention_module(window_size: int, *, shifted: bool, qk_norm: bool = False) -> WindowAttention:
    torch.manual_seed(0)
    module = WindowAttention(
        WIDTH, num_heads=HEADS, window_size=window_size, shifted=shifted, qk_norm=qk_norm
    )
    torch.nn.init.normal_(module.relative_position_bias)
    if module.qk_norm_weight is not None:
        torch.nn.init.normal_(module.qk_norm_weight)
    return module.double().requires_grad_(False)


def token_by_token(module: WindowAttention, x: Tensor, window_size: int) -> Tensor:
    """Swin's attention from its definition: pairs of positions, no windows cut out, nothing rolled."""
    _, height, width, _ = x.shape
    window = (min(window_size, height), min(window_size, width))
    shift = [
        m // 2 if module.shifted and side > m else 0 for side, m in zip((height, width), window, strict=True)
    ]
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # (1, H, W, heads, head_dim)
    if module.qk_norm_weight is not None:
        q, k = (
            part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
            for part, weight in zip((q, k), module.qk_norm_weight, strict=True)
        )
    out = torch.empty_like(q)
    positions = [(row, column) for row in range(height) for column in range(width)]
    for query in positions:
        same = [p for p in positions if _window_of(p, window, shift) == _window_of(query, window, shift)]
        rows, columns = (torch.tensor(axis) for axis in zip(*same, strict=True))
        dy, dx = query[0] - rows, query[1] - columns
        table = (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1
        scale = (WIDTH / HEADS) ** -0.5
        logits = torch.einsum("hd,nhd->nh", q[0, query[0], query[1]] * scale, k[0, rows, columns])
        weights = (logits + module.relative_position_bias[table]).softmax(0)  # (tokens, heads)
        out[0, query[0], query[1]] = torch.einsum("nh,nhd->hd", weights, v[0, rows, columns])
    return module.proj(out.flatten(-2))


def _window_of(position: tuple[int, int], window: tuple[int, int], shift: list[int]) -> tuple[int, int]:
    """Windows start at `shift`; the remainders at the two ends are windows of their own."""
    return tuple((p - s) // m for p, m, s in zip(position, window, shift, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(("grid", "window_size", "shifted"), CASES.values(), ids=CASES)
def test_window_attention_equals_its_definition(
    grid: tuple[int, int], window_size: int, shifted: bool, qk_norm: bool
) -> None:
    module = attention_module(window_size, shifted=shifted, qk_norm=qk_norm)
    x = torch.randn(1, *grid, WIDTH, dtype=torch.float64)
    given = module(x, geometry_of(grid, window_size))
    torch.testing.assert_close(given, token_by_token(module, x, window_size), rtol=0, atol=1e-12)


def test_unshifted_attention_never_crosses_a_window() -> None:
    module = attention_module(4, shifted=True)
    x = torch.randn(1, 8, 8, WIDTH, dtype=torch.float64)
    geometry = geometry_of((8, 8), 4, attention="window")
    changed = x.clone()
    changed[0, :4, :4] += 1.0
    moved = (module(changed, geometry) != module(x, geometry)).any(-1)[0]
    assert moved[:4, :4].all()
    assert not moved[4:].any()
    assert not moved[:, 4:].any()


def test_window_attention_of_a_batch_is_that_of_its_rows() -> None:
    module = attention_module(4, shifted=True)
    x = torch.randn(3, 8, 8, WIDTH, dtype=torch.float64)
    geometry = geometry_of((8, 8), 4)
    rows = torch.cat([module(row.unsqueeze(0), geometry) for row in x])
    torch.testing.assert_close(module(x, geometry), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "attention", "message"),
    [
        ((6, 8), "shifted_window", "token grid: 6 x 8 given; the windows accept sides up to 4 and multiples"),
        ((4, 8), "global", "token grid: 4 x 8 given; global attention accepts sides up to 4"),
    ],
    ids=["windows", "global"],
)
def test_a_grid_that_does_not_fit_is_refused(grid: tuple[int, int], attention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry_of(grid, 4, attention)
