"""If this fails, class accuracies are counted wrongly or by a judge that learned nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.data.places import Places
from model.evaluation.features import PlacesJudge
from model.evaluation.judge import Confusion, Judge, train_judge
from model.evaluation.sources import RealViews


def test_train_judge_learns_two_colours_and_is_saved_whole(two_colours: Places, tmp_path: Path) -> None:
    judge = train_judge(two_colours, num_views=512, batch_size=8)
    views = RealViews(places=two_colours, first_id=2**40, num=32, size=32)
    ((pixels, labels),) = views.batches(range(32))
    verdicts = judge.classify(pixels)
    assert (verdicts == labels).float().mean() > 0.9

    path = tmp_path / "judge.safetensors"
    judge.save(path)
    loaded = Judge.load(path)
    assert loaded.labels == two_colours.labels
    assert loaded.training_record == {"num_views": 512, "batch_size": 8, "seed": 0}
    assert torch.equal(loaded.classify(pixels), verdicts)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    features = PlacesJudge(path)(pixels).pooled
    assert features.shape == (32, PlacesJudge(path).num_features)
    with torch.inference_mode():
        assert torch.equal(judge.head(features).argmax(dim=1), verdicts)


def test_train_judge_is_a_function_of_its_seed(two_colours: Places) -> None:
    one, again, other = (
        train_judge(two_colours, num_views=8, batch_size=4, seed=seed).head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("size", [32, 64, 96, 256])
def test_judge_takes_every_image_size(size: int) -> None:
    judge = Judge(("a", "b", "c")).eval()
    assert judge.classify(torch.zeros(2, size, size, 3, dtype=torch.uint8)).shape == (2,)


def test_judge_load_names_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"judge: .*judge\.safetensors given; the judge\.safetensors of an"):
        Judge.load(path)
    with pytest.raises(ValueError, match="judge: "):
        Judge.load(tmp_path / "missing")


def test_confusion_reports_accuracy_by_class_and_the_worst_pairs() -> None:
    confusion = Confusion(("quay", "field", "lab"))
    confusion.add(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 1, 0]))
    confusion.add(torch.tensor([1]), torch.tensor([1]))
    assert confusion.accuracy == pytest.approx(0.6)
    report = confusion.report()
    assert report["by_class"] == {"quay": 0.5, "field": 1.0, "lab": None}
    assert report["most_confused"] == [{"asked": "quay", "judged": "field", "images": 2}]
    assert report["num_images"] == 5


@pytest.fixture(scope="module")
def two_colours() -> Places:
    """Two panoramas, noisy red and noisy blue."""
    generator = np.random.default_rng(0)
    panoramas = [generator.integers(0, 80, (32, 64, 3), dtype=np.uint8) for _ in range(2)]
    panoramas[0][..., 0] += 150
    panoramas[1][..., 2] += 150
    return Places(labels=("red", "blue"), panoramas=panoramas, class_ids=(0, 1))
