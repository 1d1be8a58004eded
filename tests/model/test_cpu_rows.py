"""model/cpu_rows.py: if this fails, rows of a step are mixed up, or a CPU with many cores uses one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.cpu_rows import RowThreads
from model.diffusion.step import DenoisingNetwork
from tests.fakes import FakeNetwork, row_arguments


@pytest.mark.parametrize(
    ("rows", "side", "parts"),
    [
        pytest.param(2, 16, 1, id="too-small"),
        pytest.param(8, 16, 2, id="small"),
        pytest.param(1, 32, 1, id="one-row"),
        pytest.param(2, 32, 2, id="guided-image"),
        pytest.param(7, 32, 3, id="unequal-parts"),
    ],
)
def test_each_row_gets_its_own_output(rows: int, side: int, parts: int) -> None:
    network = FakeNetwork(num_classes=5)
    expected = network(**row_arguments(rows, side)).sample
    network.rows_of_calls.clear()
    given = RowThreads(3).share(network)(**row_arguments(rows, side)).sample
    assert len(network.rows_of_calls) == parts
    assert sum(network.rows_of_calls) == rows
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_what_a_part_raises_is_raised() -> None:
    network = FakeNetwork(num_classes=5)
    network.failing_label = 1
    with pytest.raises(RuntimeError, match="fails on class 1"):
        RowThreads(2).share(network)(**row_arguments(4, 32))


def test_parts_run_in_inference_mode_with_one_thread_an_operation() -> None:
    states: list[tuple[bool, int]] = []

    class Network:
        dtype = torch.float32

        def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
            states.append((torch.is_inference_mode_enabled(), torch.get_num_threads()))
            return SimpleNamespace(sample=hidden_states)

    network: DenoisingNetwork = Network()
    threads = torch.get_num_threads()
    try:
        RowThreads(2).share(network)(**row_arguments(4, 32))
    finally:
        torch.set_num_threads(threads)
    assert states == [(True, 1)] * 2


def test_row_threads_need_a_thread() -> None:
    with pytest.raises(ValueError, match="num_threads: 0 given; 1 or more is accepted"):
        RowThreads(0)
