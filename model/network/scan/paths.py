"""Scan paths: in which order each direction of a VSSM visits the tokens of an H x W grid.

`paths[k, i]` is the row-major token index that direction k visits at step i, an int64 tensor `(directions,
length)`. The continuous paths are those of the released code, which knows even square grids only: there its
second and fourth direction are the reversals of the first and third, and here they are that on every grid.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

NUM_DIRECTIONS = {"ss2d_continuous": 4, "ss2d": 4, "vim": 2, "local_mamba": 4, "es2d": 4}


def scan_paths(vssm: str, height: int, width: int, *, window_size: int = 4) -> Tensor:
    """The paths `(directions, path_length)` of VSSM kind `vssm`; `path_length` is H*W, for "es2d" H*W/4.

    Raises ValueError where the grid does not fit the kind: "local_mamba" needs sides divisible by
    `window_size`, "es2d" even sides.
    """
    grid = torch.arange(height * width).reshape(height, width)
    if vssm == "ss2d_continuous":
        rows, columns = _snake(grid), _snake(grid.flip(0).T)
        return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])
    if vssm == "ss2d":
        return _with_reversals(grid.flatten(), grid.T.flatten())
    if vssm == "vim":
        return _with_reversals(grid.flatten())
    if vssm == "local_mamba":
        _require_multiple(vssm, height, width, window_size)
        return _with_reversals(_windowed(grid, window_size), _windowed(grid.T, window_size))
    if vssm == "es2d":
        _require_multiple(vssm, height, width, 2)
        return torch.stack(
            [
                grid[0::2, 0::2].flatten(),
                grid[0::2, 1::2].T.flatten(),
                grid[1::2, 0::2].flatten().flip(0),
                grid[1::2, 1::2].T.flatten().flip(0),
            ]
        )
    raise ValueError(f"vssm: {vssm!r} given; one of {', '.join(NUM_DIRECTIONS)} is accepted")


def _snake(grid: Tensor) -> Tensor:
    """Row by row, every second row backwards: neighbours on the path are neighbours on the grid."""
    rows = grid.clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.flatten()


def _windowed(grid: Tensor, window_size: int) -> Tensor:
    return rearrange(grid, "(h i) (w j) -> (h w i j)", i=window_size, j=window_size)


def _with_reversals(*paths: Tensor) -> Tensor:
    """The paths, then the reversal of each: the order of the released code's plain SS2D."""
    return torch.stack([*paths, *(path.flip(0) for path in paths)])


def _require_multiple(vssm: str, height: int, width: int, multiple: int) -> None:
    if height % multiple or width % multiple:
        raise ValueError(
            f"token grid: {height} x {width} given; vssm {vssm!r} accepts multiples of {multiple}"
        )
