"""model/fixed_rows.py: if this fails, what else is in a batch changes an image that was to be the same."""

from __future__ import annotations

import pytest
import torch

from model.fixed_rows import FixedRows
from tests.fakes import FakeNetwork, row_arguments


@pytest.mark.parametrize(
    ("rows", "calls"), [(1, [4]), (4, [4]), (5, [4, 4]), (8, [4, 4])], ids=["one", "all", "one-more", "twice"]
)
def test_each_row_gets_its_own_output_from_calls_of_one_size(rows: int, calls: list[int]) -> None:
    network = FakeNetwork(num_classes=5)
    expected = network(**row_arguments(rows, 16)).sample
    network.rows_of_calls.clear()
    fixed = FixedRows(network, num_rows=4)
    torch.testing.assert_close(fixed(**row_arguments(rows, 16)).sample, expected, rtol=0, atol=0)
    assert network.rows_of_calls == calls
    assert fixed.num_computed(rows) == sum(calls)
    assert fixed.dtype == torch.float32


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="num_rows: 0 given; 1 or more is accepted"):
        FixedRows(FakeNetwork(num_classes=5), num_rows=0)
