"""service/engine/runner: if this fails, the first large batch waits for kernels to be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.engine.runner import Runner, _warm_up_steps
from tests.fakes import fake_pipeline


@pytest.mark.parametrize(
    ("max_rows", "conditional", "expected"),
    [
        (128, True, [(1, True), (64, True), (1, False), (128, False)]),
        (2, True, [(1, True), (1, False), (2, False)]),
        (1, True, [(1, False)]),
        (128, False, [(1, False), (128, False)]),
    ],
    ids=["usual", "one-image", "one-row", "unconditional"],
)
def test_warm_up_steps_reach_the_fewest_and_the_most_rows(
    max_rows: int, conditional: bool, expected: list[tuple[int, bool]]
) -> None:
    assert _warm_up_steps(max_rows, conditional=conditional, all_ends=True) == expected
    assert _warm_up_steps(max_rows, conditional=conditional, all_ends=False) == expected[:1]


def test_warm_up_on_a_cpu_is_one_image() -> None:
    pipeline = fake_pipeline()
    network: Any = pipeline.network
    autoencoder: Any = pipeline.autoencoder
    Runner(pipeline, num_slots=8).warm_up(decode_batch=4)
    assert (network.rows_of_calls, autoencoder.batches) == ([2], [1])


def test_warm_up_on_cuda_runs_all_ends_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = fake_pipeline()
    runner = Runner(pipeline, num_slots=8)
    network: Any = pipeline.network
    # The sizes alone depend on the device's type; the tensors stay on the CPU.
    monkeypatch.setattr(runner, "_all_sizes", True)
    with torch.inference_mode():
        runner.warm_up(decode_batch=4)
    assert network.rows_of_calls == [2, 8, 1, 8]
