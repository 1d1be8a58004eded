"""The peer and our copies: if this fails, the comparison is with something else than DiT, or of networks with
different weights.
"""

from __future__ import annotations

import pytest
import torch

from model.benchmark.networks import EmbeddedOnce, build_dit, build_lamamba, twin
from model.network.scan import resolve_scan_backend

CPU = torch.device("cpu")


def test_dit_xl_2_has_its_papers_parameters() -> None:
    network = build_dit("XL", 32, device=torch.device("meta"), dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    position_table = 256 * 1152  # a fixed table, which the paper's code counts
    assert parameters + position_table == pytest.approx(675.13e6, rel=1e-4)


def test_one_embedding_computes_the_same() -> None:
    network = build_dit("tiny", 8, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 3, 9])
    once = EmbeddedOnce(twin(network))
    with torch.inference_mode():
        expected = network(x, timestep=t, class_labels=y).sample
        sample = once(x, timestep=t, class_labels=y).sample
    assert expected.std() > 0.01
    torch.testing.assert_close(sample, expected, rtol=0, atol=0)


def test_a_twin_shares_tensors_and_has_a_backend_of_its_own() -> None:
    network = build_lamamba("tiny", 8, d_state=1, device=CPU, dtype=torch.float32)
    copy = twin(network)
    copy.use_scan_backend(resolve_scan_backend("reference"))
    assert (network.scan_backend, copy.scan_backend) == ("vectorized", "reference")
    pairs = zip(
        [*network.parameters(), *network.buffers()], [*copy.parameters(), *copy.buffers()], strict=True
    )
    assert all(own.data_ptr() == other.data_ptr() for own, other in pairs)


def test_no_modulation_of_ours_is_zero() -> None:
    network = build_lamamba("tiny", 8, d_state=1, device=CPU, dtype=torch.float32)
    assert all(
        parameter.any() for name, parameter in network.named_parameters() if "modulation.weight" in name
    )
