"""If this fails, ranks learn from a part of the gradients, or from those of a step that never was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.training.gradients import GradientBuckets, in_buckets


@pytest.fixture(autouse=True)
def _small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.training.gradients._BUCKET_NUMBERS", 4)


def _parameters() -> list[Tensor]:
    return [torch.arange(1.0, size + 1, requires_grad=True) for size in (3, 1, 6, 2, 2)]


def _gathered(buckets: GradientBuckets, parameters: list[Tensor]) -> list[list[float]]:
    flat = buckets.gather()
    assert all(parameter.grad is None for parameter in parameters)
    buckets.scatter(flat)
    gradients = [[] if p.grad is None else p.grad.tolist() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def test_in_buckets_keeps_the_order_and_gives_large_ones_their_own() -> None:
    assert in_buckets([2, 2, 6, 1, 3, 4], int) == [[2, 2], [6], [1, 3], [4]]


@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_of_all_passes_come_back_to_their_parameters(passes: int) -> None:
    parameters = _parameters()
    buckets = GradientBuckets(parameters, passes=passes)
    for _ in range(2):  # steps
        for _ in range(passes):
            sum(parameter.square().sum() for parameter in parameters).backward()
        wanted = [(2 * passes * parameter).tolist() for parameter in parameters]
        assert _gathered(buckets, parameters) == wanted


def test_parameters_without_a_part_in_the_loss_have_zeros() -> None:
    """Whether in all passes of a step or in some."""
    parameters = _parameters()
    buckets = GradientBuckets(parameters, passes=2)
    for used in (parameters[1:], parameters[:2]):
        sum(parameter.sum() for parameter in used).backward()
    assert [gradient[0] for gradient in _gathered(buckets, parameters)] == [1, 2, 1, 1, 1]
    for _ in range(2):
        parameters[0].sum().backward()
    assert [gradient[0] for gradient in _gathered(buckets, parameters)] == [2, 0, 0, 0, 0]


def test_gradients_that_are_not_finite_stay_so_for_the_update_to_see() -> None:
    parameters = _parameters()
    buckets = GradientBuckets(parameters, passes=1)
    sum((parameter * torch.nan).sum() for parameter in parameters[:1]).backward()
    assert not torch.isfinite(torch.cat(buckets.gather())).all()


def test_a_pass_that_failed_is_forgotten() -> None:
    parameters = _parameters()
    buckets = GradientBuckets(parameters, passes=2)
    parameters[4].sum().backward()
    sum(parameter.sum() for parameter in parameters[3:]).backward()  # some buckets are made, some begun
    for parameter in parameters:
        parameter.grad = None
    buckets.clear()
    for _ in range(2):
        sum(parameter.sum() for parameter in parameters).backward()
    assert [gradient[0] for gradient in _gathered(buckets, parameters)] == [2, 2, 2, 2, 2]
