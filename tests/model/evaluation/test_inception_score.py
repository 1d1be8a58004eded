"""If this fails, the Inception Score is not that of ADM's evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.evaluation import inception_score
from model.evaluation.inception_score import InceptionScoreStream


def _score(probabilities: torch.Tensor, batch: int = 7) -> float:
    stream = InceptionScoreStream()
    for first in range(0, len(probabilities), batch):
        stream.add(first, probabilities[first : first + batch])
    return stream.score()


def _random(n: int, classes: int = 10) -> torch.Tensor:
    logits = 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(0))
    return logits.softmax(dim=1)


def test_score_of_certain_and_equally_frequent_classes_is_their_number() -> None:
    assert _score(torch.eye(8).repeat(3, 1)) == pytest.approx(8)
    assert _score(torch.full((5, 8), 1 / 8)) == pytest.approx(1)


def test_score_is_the_mean_over_splits_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_score, "SPLIT_SIZE", 20)
    p = _random(50)
    scores = []
    for part in (p[:20].double().numpy(), p[20:40].double().numpy(), p[40:].double().numpy()):
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    assert _score(p) == pytest.approx(np.mean(scores), rel=1e-12)


def test_score_of_several_ranks_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_score, "SPLIT_SIZE", 20)
    p = _random(50)
    first, second = InceptionScoreStream(), InceptionScoreStream()
    first.add(0, p[:30])
    second.add(30, p[30:])
    first.merge(second)
    assert first.score() == pytest.approx(_score(p), rel=1e-12)
