"""If this fails, scans visit tokens in another order than weights were trained with: pictures dissolve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import VSSM_KINDS
from model.network.geometry import GridGeometry
from model.network.scan import reference, resolve_scan_backend
from model.network.scan.paths import NUM_DIRECTIONS, scan_paths
from model.network.vssm import VisualStateSpace

GRIDS = {
    "one-token": (1, 1),
    "one-row": (1, 6),
    "odd": (3, 5),
    "wide": (2, 6),
    "tall": (8, 4),
    "square": (4, 4),
}
ANY_GRID = ("ss2d_continuous", "ss2d", "vim")


def cases() -> list[object]:
    fits = [(kind, name) for kind in VSSM_KINDS for name in GRIDS if kind in ANY_GRID or name == "tall"]
    return [pytest.param(kind, GRIDS[name], id=f"{kind}-{name}") for kind, name in fits]


@pytest.mark.parametrize(("vssm", "grid"), cases())
def test_paths_visit_each_token_once(vssm: str, grid: tuple[int, int]) -> None:
    height, width = grid
    paths = scan_paths(vssm, height, width)
    assert len(paths) == NUM_DIRECTIONS[vssm]
    if vssm == "es2d":  # each direction visits its own quarter
        assert sorted(paths.flatten().tolist()) == list(range(height * width))
    else:
        for path in paths:
            assert sorted(path.tolist()) == list(range(height * width))


@pytest.mark.parametrize("side", [2, 4, 8])
def test_continuous_paths_equal_the_authors_formulas(side: int) -> None:
    expected: list[list[int]] = [[], [], [], []]
    for i in range(side):
        for j in range(side):
            turned = j if i % 2 == 0 else side - 1 - j
            expected[0].append(i * side + turned)
            expected[1].append((side - 1 - i) * side + turned)
    for j in range(side):
        for i in range(side):
            row = side - 1 - i if j % 2 == 0 else i
            expected[2].append(row * side + j)
            expected[3].append(row * side + side - 1 - j)
    assert scan_paths("ss2d_continuous", side, side).tolist() == expected


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (6, 2), (4, 4), (1, 7)], ids=str)
def test_continuous_paths_step_to_a_neighbour_on_every_grid(grid: tuple[int, int]) -> None:
    height, width = grid
    paths = scan_paths("ss2d_continuous", height, width)
    rows, columns = paths // width, paths % width
    distances = rows.diff(dim=1).abs() + columns.diff(dim=1).abs()
    assert (distances == 1).all()
    assert torch.equal(paths[1], paths[0].flip(0))
    assert torch.equal(paths[3], paths[2].flip(0))


def test_the_other_kinds_on_a_small_grid() -> None:
    assert scan_paths("ss2d", 2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert scan_paths("vim", 2, 2).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    local = scan_paths("local_mamba", 2, 4, window_size=2)
    assert local[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert local[1].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(local[2:], local[:2].flip(1))
    assert scan_paths("es2d", 4, 4).tolist() == [[0, 2, 8, 10], [1, 9, 3, 11], [14, 12, 6, 4], [15, 7, 13, 5]]


@pytest.mark.parametrize(
    ("vssm", "grid", "message"),
    [
        ("local_mamba", (6, 4), "token grid: 6 x 4 given; vssm 'local_mamba' accepts multiples of 4"),
        ("es2d", (4, 5), "token grid: 4 x 5 given; vssm 'es2d' accepts multiples of 2"),
        ("snake", (4, 4), "vssm: 'snake' given; one of ss2d_continuous"),
    ],
    ids=["local_mamba", "es2d", "unknown"],
)
def test_paths_refuse_a_grid_that_does_not_fit(vssm: str, grid: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan_paths(vssm, *grid)


@pytest.mark.parametrize("backend", ["reference", "vectorized"])
@pytest.mark.parametrize("vssm", VSSM_KINDS)
def test_a_token_depends_on_exactly_the_tokens_before_it_on_each_path(vssm: str, backend: str) -> None:
    """The Jacobian of the scan's output by its inputs u, one direction at a time and all together."""
    height, width = 4, 6
    torch.manual_seed(0)
    paths = scan_paths(vssm, height, width, window_size=2)
    directions, length = len(paths), height * width
    scan = resolve_scan_backend(backend).selective_scan
    dt = torch.randn(1, length, directions, 1, dtype=torch.float64)
    weight = torch.ones(directions, 1, 1, dtype=torch.float64)
    A = -torch.rand(directions, 1, 1, dtype=torch.float64)
    B, C = torch.rand(2, 1, length, directions, 1, dtype=torch.float64) + 0.5
    D, delta_bias = torch.ones(directions, 1), torch.zeros(directions, 1)
    before = torch.stack([_visited_before(path, length) for path in paths])  # (directions, length, length)
    for chosen in (*[[k] for k in range(directions)], list(range(directions))):

        def run(u: Tensor, k: list[int] = chosen) -> Tensor:
            u = u.view(1, length, 1)
            dt_k, B_k, C_k = (tensor[:, :, k] for tensor in (dt, B, C))
            part = scan(u, dt_k, weight[k], A[k], B_k, C_k, D[k], delta_bias[k], paths[k])
            return part.flatten()

        jacobian = torch.autograd.functional.jacobian(run, torch.randn(length, dtype=torch.float64))
        assert torch.equal(jacobian != 0, before[chosen].any(0))


def _visited_before(path: Tensor, length: int) -> Tensor:
    """`[i, j]`: token j is visited no later than token i, both on the path."""
    step = torch.full((length,), -1)
    step[path] = torch.arange(len(path))
    return (step.unsqueeze(0) <= step.unsqueeze(1)) & (step.unsqueeze(0) >= 0)


@pytest.mark.parametrize("vssm", VSSM_KINDS)
def test_a_visual_state_space_module_passes_information_along_its_paths(vssm: str) -> None:
    """A token hears of the tokens before it on some path, widened by the convolution, and of no other."""
    side = 8
    torch.manual_seed(0)
    backend = resolve_scan_backend("vectorized")
    directions = NUM_DIRECTIONS[vssm]
    module = VisualStateSpace(4, d_state=2, num_directions=directions, conv_bias=True, scan_backend=backend)
    module.initialize_weights()
    module.double()
    geometry = GridGeometry(side, side, vssm=vssm, scan_window_size=4, attention="none", window_size=8)
    x = torch.randn(1, side, side, 4, dtype=torch.float64)
    token = (4, 4)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, geometry)[0, token[0], token[1]], x)
    heard = (jacobian != 0).any(dim=(0, 1, -1)).flatten()  # by token

    before = torch.stack([_visited_before(path, side * side) for path in geometry.paths]).any(0)
    scanned = before[token[0] * side + token[1]].view(1, 1, side, side).double()
    reached = torch.nn.functional.max_pool2d(scanned, 3, stride=1, padding=1) > 0  # the convolution before
    assert torch.equal(heard, reached.flatten())


def test_a_direction_leaves_unvisited_tokens_alone() -> None:
    u = torch.ones(1, 4, 1)
    others = torch.ones(1, 4, 1, 1)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    y = reference.selective_scan(
        u, others, one[..., None], zero[..., None], others, others, one, zero, torch.tensor([[2, 0]])
    )
    assert y[0, 1] == 0
    assert y[0, 3] == 0
    assert y[0, 0] > y[0, 2] > 1
