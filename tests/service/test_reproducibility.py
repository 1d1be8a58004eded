"""If this fails, a seed no longer fixes an image: what others ask for at the same time changes it.

Random mixes of requests, with a small real network: its sums depend on the number of rows, as a large
one's do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import fixed_rows
from model.pipeline import LaMambaPipeline
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, ImageJob, LaneName, Ticket
from service.engine.runner import FinishedLatents
from service.metrics import Metrics
from service.model_loading import ModelSource, load_pipeline, rows_of_calls
from service.settings import Settings
from tests.service.engine_requests import TOLERANCE, images
from tests.tiny_model import LABELS, save_autoguided_model, save_tiny_model

NUM_MIXES = 50
MAX_ROWS = 8
BLOCKS: dict[str, Any] = {"layout": "isotropic", "depths": [2], "bottleneck_depth": 0, "hidden_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), **BLOCKS)


def random_request(rng: random.Random, index: int) -> GenerationRequest:
    """Any request; half of them have an interval of their own."""
    low, high = sorted(rng.sample(range(1000), 2))
    return GenerationRequest(
        request_id=f"r{index}",
        model="tiny",
        class_label=rng.randrange(len(LABELS)),
        guidance_scale=rng.choice((1.0, 2.0, 7.5)),
        guidance_interval=rng.choice((None, (low, high))),
        num_inference_steps=rng.randint(1, 3),
        sampler=rng.choice(("ddpm", "ddim", "dpm++")),
        seed=rng.randrange(2**63),
        image_index=rng.randrange(100),
    )


class MixedEngine:
    """An engine whose steps the test takes, among whose images one is looked for."""

    def __init__(self, pipeline: LaMambaPipeline) -> None:
        self.pipeline = pipeline
        self.engine = Engine(
            {LaneName("tiny"): pipeline}, max_rows=MAX_ROWS, max_queue_images=64, metrics=Metrics()
        )
        self.latents: dict[ImageJob, Tensor] = {}
        decode = self.engine._decoder.submit

        def keep_and_decode(finished: FinishedLatents) -> None:
            self.latents.update(zip(finished.jobs, finished.latents, strict=True))
            decode(finished)

        self.engine._decoder.submit = keep_and_decode  # type: ignore[method-assign]
        self.engine._decoder.start()

    def made_among_others(self, rng: random.Random, wanted: GenerationRequest) -> tuple[Tensor, np.ndarray]:
        """Latents and pixels of an image that joins others at some step, which join and leave at others."""
        requests = [random_request(rng, index) for index in range(1, rng.randint(2, 5))]
        requests.insert(rng.randrange(len(requests) + 1), wanted)
        tickets: list[Ticket] = []
        for request in requests:
            tickets.append(self.engine.submit(request))
            for _ in range(rng.randint(0, 2)):
                self.engine.step()
        while self.engine.step():
            pass
        ticket = tickets[requests.index(wanted)]
        return self.latents[ticket.jobs[0]], images(ticket)[0]

    def latents_alone(self, request: GenerationRequest) -> Tensor:
        return self.pipeline.sample_latents(
            [request.class_label],
            seeds=[request.seed],
            image_indices=[request.image_index],
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
            num_inference_steps=request.num_inference_steps,
            sampler=request.sampler,
        )

    def differences(self, num_mixes: int = NUM_MIXES) -> tuple[list[float], list[int]]:
        """Of each mix: the largest of the latents, and the largest of the pixels in steps of 1/255."""
        of_latents, of_pixels = [], []
        for seed in range(num_mixes):
            rng = random.Random(seed)
            wanted = random_request(rng, 0)
            latents, pixels = self.made_among_others(rng, wanted)
            latents_alone = self.latents_alone(wanted)  # (1, C, h, w)
            pixels_alone = self.pipeline.decode(latents_alone).numpy()[0].astype(int)
            of_latents.append(float((latents - latents_alone).abs().max()))
            of_pixels.append(int(np.abs(pixels - pixels_alone).max()))
        return of_latents, of_pixels


MixedEngineFactory = Callable[..., MixedEngine]


@pytest.fixture
def engine_of(folder: Path) -> Iterator[MixedEngineFactory]:
    """Makes engines of the model, loaded with options, and stops them at the end of the test."""
    made: list[MixedEngine] = []

    def make(model: Path = folder, **options: Any) -> MixedEngine:
        made.append(MixedEngine(LaMambaPipeline.load(model, **options)))
        return made[-1]

    yield make
    for mixed in made:
        mixed.engine.stop()


def test_an_image_among_others_is_the_one_alone(engine_of: MixedEngineFactory) -> None:
    of_latents, of_pixels = engine_of(device="cpu").differences()
    assert max(of_pixels) <= TOLERANCE
    assert max(of_latents) > 0  # else the next test would show nothing


def test_an_image_of_an_autoguided_model_among_others_is_the_one_in_process(
    engine_of: MixedEngineFactory, tmp_path: Path
) -> None:
    model = save_autoguided_model(tmp_path, **BLOCKS)
    _, of_pixels = engine_of(model, device="cpu").differences(num_mixes=10)
    assert max(of_pixels) <= TOLERANCE


def test_with_fixed_rows_an_image_among_others_is_the_one_alone_to_the_bit(
    engine_of: MixedEngineFactory,
) -> None:
    of_latents, of_pixels = engine_of(device="cpu", fixed_rows=1).differences()
    assert (max(of_latents), max(of_pixels)) == (0.0, 0)


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        pytest.param("cpu", {}, None, id="off"),
        pytest.param("cpu", {"deterministic": True, "max_rows": 64}, 1, id="cpu"),
        pytest.param("cuda", {"deterministic": True}, 16, id="cuda"),
        pytest.param("cuda:1", {"deterministic": True, "max_rows": 64}, 64, id="cuda-with-max-rows"),
    ],
)
def test_the_setting_fixes_the_rows_of_a_call(
    device: str, settings: dict[str, Any], expected: int | None
) -> None:
    assert rows_of_calls(Settings(**settings), torch.device(device)) == expected


def test_a_deterministic_server_loads_its_models_so(folder: Path) -> None:
    source = ModelSource(folder=folder, name=None)
    pipeline = load_pipeline(source, torch.device("cpu"), Settings(deterministic=True, device="cpu"))
    assert isinstance(pipeline, LaMambaPipeline)
    assert pipeline.fixed_rows is not None
    assert (pipeline.fixed_rows.num_rows, pipeline.num_rows(3, 2)) == (1, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graph", "eager"])
def test_with_fixed_rows_a_gpu_makes_the_same_image_to_the_bit(
    engine_of: MixedEngineFactory, dtype: torch.dtype, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fixed_rows.prepare_process()
    try:
        mixed = engine_of(device="cuda", dtype=dtype, fixed_rows=MAX_ROWS, cuda_graphs=cuda_graphs)
        of_latents, of_pixels = mixed.differences()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert (max(of_latents), max(of_pixels)) == (0.0, 0)
