"""The constants of one token grid, built once per resolution: scan paths, window bias index, shift mask.

They depend on the grid's sides alone and are shared by all blocks that work on it, so no forward builds or
copies them. Windows follow Swin (Liu et al. 2021): side M, or the whole axis where the grid is smaller.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from model.network.scan.paths import scan_paths

MASKED_LOGIT = -100.0


class GridGeometry(nn.Module):
    """Buffers for one H x W grid. Raises ValueError where H or W does not fit the windows or the scan.

    Attributes:
        paths: `(directions, path_length)` int64, see `scan.paths`.
        window: `(height, width)` of an attention window in tokens, or None without attention.
        bias_index: `(M*M, M*M)` int64, the row of the bias table for a (query, key) pair of a window.
        shift: `(rows, columns)` by which odd blocks roll the grid; 0 along an axis that one window covers.
        shift_mask: `(windows, 1, M*M, M*M)` fp32, -100 between tokens that only the roll made neighbours.
    """

    paths: Tensor
    bias_index: Tensor
    shift_mask: Tensor

    def __init__(
        self, height: int, width: int, *, vssm: str, scan_window_size: int, attention: str, window_size: int
    ) -> None:
        super().__init__()
        self.height, self.width = height, width
        paths = scan_paths(vssm, height, width, window_size=scan_window_size)
        self.register_buffer("paths", paths, persistent=False)
        self.window: tuple[int, int] | None = None
        self.shift = (0, 0)
        if attention == "none":
            return
        if attention == "global" and max(height, width) > window_size:
            raise ValueError(
                f"token grid: {height} x {width} given; global attention accepts sides up to {window_size}"
            )
        self.window = (min(window_size, height), min(window_size, width))
        for side, window in zip((height, width), self.window, strict=True):
            if side % window:
                raise ValueError(
                    f"token grid: {height} x {width} given; the windows accept sides up to {window_size} and "
                    "multiples of it"
                )
        self.register_buffer(
            "bias_index", relative_position_index(self.window, window_size), persistent=False
        )
        if attention == "shifted_window":
            self.shift = (
                self.window[0] // 2 if height > self.window[0] else 0,
                self.window[1] // 2 if width > self.window[1] else 0,
            )
        if any(self.shift):
            self.register_buffer("shift_mask", self._shift_mask(), persistent=False)

    def _shift_mask(self) -> Tensor:
        assert self.window is not None
        rows = _shift_regions(self.height, self.window[0], self.shift[0])
        columns = _shift_regions(self.width, self.window[1], self.shift[1])
        regions = 3 * rows.unsqueeze(1) + columns.unsqueeze(0)  # (H, W)
        windows = rearrange(
            regions, "(h m) (w n) -> (h w) (m n)", m=self.window[0], n=self.window[1]
        )  # (windows, M*M)
        differs = windows.unsqueeze(1) != windows.unsqueeze(2)
        return torch.zeros(differs.shape).masked_fill_(differs, MASKED_LOGIT).unsqueeze(1)


def relative_position_index(window: tuple[int, int], table_window: int) -> Tensor:
    """Rows `(M*M, M*M)` of a bias table made for windows of side `table_window`: (dy + M - 1)(2M - 1) + dx +
    M - 1.
    """
    grid = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    positions = torch.stack(grid).flatten(1)  # (2, M*M)
    dy, dx = positions.unsqueeze(2) - positions.unsqueeze(1)  # query minus key
    return (dy + table_window - 1) * (2 * table_window - 1) + dx + table_window - 1


def _shift_regions(side: int, window: int, shift: int) -> Tensor:
    """The region of each row of the rolled grid: [0, S-M), [S-M, S-M/2), [S-M/2, S); one region without a
    shift.
    """
    positions = torch.arange(side)
    if not shift:
        return torch.zeros_like(positions)
    return (positions >= side - window).long() + (positions >= side - shift).long()
