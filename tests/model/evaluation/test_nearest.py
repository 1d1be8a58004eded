"""If this fails, a model that repeats its training data could look as if it did not."""

from __future__ import annotations

import torch

from model.evaluation.nearest import NearestSearch, nearest_views
from tests.extractors import MeanColour


def test_nearest_search_over_parts_is_that_over_all() -> None:
    queries, candidates = torch.randn(5, 7), torch.randn(40, 7)
    search = NearestSearch(queries)
    for ids in torch.arange(40).split(9):
        search.add(ids, candidates[ids])
    expected = (queries[:, None] - candidates).norm(dim=2).min(dim=1)
    assert torch.equal(search.ids, expected.indices)
    torch.testing.assert_close(search.distances, expected.values)
    assert search.summary(slice(0, 1)) == {
        "median": round(expected.values[0].item(), 4),
        "smallest": round(expected.values[0].item(), 4),
    }


def test_nearest_views_finds_a_copy_and_measures_pixels_in_levels() -> None:
    candidates = torch.randint(0, 250, (12, 8, 8, 3), dtype=torch.uint8)
    batches = ((part, torch.zeros(len(part))) for part in candidates.split(5))
    images = torch.stack([candidates[7], candidates[3] + 2])
    found = nearest_views(images, batches, extractor=MeanColour())
    assert found["pixels"].ids.tolist() == [7, 3]
    torch.testing.assert_close(found["pixels"].distances, torch.tensor([0.0, 2.0]), atol=1e-2, rtol=0)
    assert found["features"].ids[0] == 7
