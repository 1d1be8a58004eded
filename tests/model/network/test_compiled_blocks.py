"""If these fail, compiling the network stops half-way, or starts again at each size of a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model import LaMambaDiff
from model.network.compiled_blocks import with_compiled_blocks


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> LaMambaDiff:
    """A network whose blocks are traced as for compilation, but run as they are."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = LaMambaDiff(
        sample_size=16,
        hidden_size=8,
        depths=(1, 1, 1, 0),
        decoder_extra_block=False,
        num_heads=2,
        window_size=4,
        num_classes=5,
    )
    for name, parameter in net.named_parameters():
        if ".modulation." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    net.graphs = 0  # type: ignore[assignment]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        net.graphs += 1  # type: ignore[operator]
        return graph.forward

    monkeypatch.setattr(net, "compile_repeated_blocks", partial(net.compile_repeated_blocks, backend=backend))
    return net.eval().requires_grad_(False)


def _inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    latents = torch.randn(rows, 4, 16, 16, generator=generator)
    return latents, torch.arange(rows) * 7.5, torch.arange(rows) % 6


@pytest.mark.slow
def test_blocks_compile_once_a_kind_and_shape_of_batch(network: LaMambaDiff) -> None:
    sizes = (24, 20, 6, 2)
    with torch.inference_mode():
        expected = [network(*_inputs(rows)).sample for rows in sizes]
        run = with_compiled_blocks(network, lambda rows: network(*_inputs(rows)).sample)
        graphs = []
        for rows, reference in zip(sizes, expected, strict=True):
            torch.testing.assert_close(run(rows), reference, rtol=1e-5, atol=1e-5)
            graphs.append(network.graphs)
    # Grids of 16, 8 and 4: at the first size, then for large batches, then for small ones, which the scan
    # cuts in another way.
    assert graphs == [3, 6, 9, 9]


def test_more_kinds_than_torch_allows_by_default_are_compiled(network: LaMambaDiff) -> None:
    """Every batch size by itself, as training asks for it."""
    run = with_compiled_blocks(network, lambda rows: network(*_inputs(rows)).sample, dynamic=False)
    with torch.inference_mode():
        for rows in (2, 3, 5):
            run(rows)
    assert network.graphs == 9
