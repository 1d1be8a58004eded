"""benchmarks/litserve_server.py: if this fails, the server is compared with one that does other work.

LitServe itself is not needed: its base class is a fake that keeps the batch's limits.
"""

from __future__ import annotations

import base64
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from PIL import Image

from model.images import read_metadata
from tests.fakes import fake_pipeline

STEPS = (2, 5, 3)


class FakeLitAPI:
    def __init__(self, *, max_batch_size: int, batch_timeout: float, api_path: str) -> None:
        self.max_batch_size = max_batch_size


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=FakeLitAPI))
    monkeypatch.delitem(sys.modules, "benchmarks.litserve_server", raising=False)
    module: ModuleType = importlib.import_module("benchmarks.litserve_server")
    made = module.LaMambaAPI(Path("model"), max_batch_size=4, batch_timeout=0.02)
    made.serve(fake_pipeline())
    return made


def bodies() -> list[dict[str, Any]]:
    return [
        {"class_id": index, "steps": steps, "seed": 7 + index, "cfg_scale": 2.0, "resolution": 16}
        for index, steps in enumerate(STEPS)
    ]


def test_a_mixed_batch_answers_each_request_with_the_pipelines_image(api: Any) -> None:
    requests = api.batch([api.decode_request(body) for body in bodies()])
    answers = [api.encode_response(output) for output in api.unbatch(api.predict(requests))]
    for body, answer in zip(bodies(), answers, strict=True):
        expected = fake_pipeline().generate(
            [body["class_id"]], seeds=[body["seed"]], guidance_scale=2.0, num_inference_steps=body["steps"]
        )
        file = base64.b64decode(answer["images"][0]["b64_json"])
        with Image.open(io.BytesIO(file)) as image:
            np.testing.assert_array_equal(np.asarray(image), expected[0].numpy())
        assert read_metadata(file)["steps"] == str(body["steps"])
        assert answer["seed"] == body["seed"]
        assert set(answer["timings"]) == {"denoise", "decode", "encode"}


def test_a_finished_image_costs_no_further_row(api: Any) -> None:
    api.predict([api.decode_request(body) for body in bodies()])
    assert api.pipeline.network.rows_of_calls == [6, 6, 4, 2, 2]
    api.pipeline.network.rows_of_calls.clear()
    api.predict([api.decode_request(body) for body in bodies()])
    assert api.pipeline.network.rows_of_calls == [6, 6, 4, 2, 2], "slots are as new in the next batch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5000}, "steps: 5000 given"),
        ({"num_images": 2}, "num_images: 2 given; this model accepts 1 to 1"),
        ({"stpes": 5}, "stpes"),
    ],
    ids=["range", "images", "field"],
)
def test_what_the_model_does_not_make_is_refused(api: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(HTTPException) as refused:
        api.decode_request(bodies()[0] | change)
    assert refused.value.status_code == 422
    assert message in str(refused.value.detail)
