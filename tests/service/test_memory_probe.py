"""service/engine/memory_probe.py: if this fails, a GPU runs out of memory at its first full batch."""

from __future__ import annotations

import pytest
import torch

from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from service.engine.memory_probe import StepMemory, fitting_rows, probe_max_rows

GIB = 2.0**30
STEP = StepMemory(fixed=0.1 * GIB, per_row=0.05 * GIB)


def test_two_measurements_give_the_line() -> None:
    assert StepMemory.between(2, 100.0, 16, 380.0) == StepMemory(fixed=60.0, per_row=20.0)
    assert StepMemory.between(2, 300.0, 16, 200.0) == StepMemory(fixed=300.0, per_row=0.0)
    assert StepMemory.between(2, 10.0, 16, 290.0) == StepMemory(fixed=0.0, per_row=20.0)


@pytest.mark.parametrize(
    ("free_gib", "captured", "models", "expected"),
    [
        pytest.param(80.0, True, 1, 128, id="large-gpu"),
        pytest.param(7.3, False, 1, 128, id="just-all"),
        pytest.param(7.0, False, 1, 96, id="just-not-all"),
        pytest.param(7.3, True, 1, 48, id="graphs-keep-their-own"),
        pytest.param(7.3, True, 3, 24, id="graphs-of-three-models"),
        pytest.param(7.3, False, 3, 128, id="models-take-turns"),
        pytest.param(0.46, False, 1, 2, id="one-image"),
    ],
)
def test_fitting_rows_are_those_of_a_captured_size(
    free_gib: float, captured: bool, models: int, expected: int
) -> None:
    rows = fitting_rows(
        [STEP] * models, free_bytes=free_gib * GIB, decode_bytes=[0.06 * GIB] * models, captured=captured
    )
    assert rows == expected


def test_the_decoder_and_a_share_of_the_memory_are_left_free() -> None:
    def rows(free_gib: float, decode_gib: float) -> int:
        return fitting_rows(
            [STEP], free_bytes=free_gib * GIB, decode_bytes=[decode_gib * GIB], captured=False
        )

    needed = 0.1 + 64 * 0.05
    assert rows(needed / 0.9 + 0.001, 0.0) == 64
    assert rows(needed / 0.9 - 0.001, 0.0) == 48
    assert rows((needed + 1.0) / 0.9 + 0.001, 1.0) == 64
    assert rows((needed + 1.0) / 0.9 - 0.001, 1.0) == 48
    needed, least_kept = 0.1 + 16 * 0.05, 0.1875
    assert rows(needed + least_kept + 0.001, 0.0) == 16
    assert rows(needed + least_kept - 0.001, 0.0) == 12


def test_a_gpu_without_memory_for_an_image_is_refused_in_gib() -> None:
    with pytest.raises(ValueError, match=r"max_rows: 0 given, and 0\.25 GiB are free .* need 0\.49"):
        fitting_rows([STEP], free_bytes=0.25 * GIB, decode_bytes=[0.1 * GIB], captured=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("free_gib", [0.625, 0.75])
def test_the_probed_rows_run_in_the_memory_that_there_is(free_gib: float) -> None:
    pipeline = LaMambaPipeline.load(default_model_dir(256), device="cuda")
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    held = torch.empty(int(free_bytes - free_gib * GIB), dtype=torch.uint8, device="cuda")
    rows = probe_max_rows([pipeline], decode_batch=4, captured=True)
    assert rows >= 2
    num_images = rows // 2
    for _ in pipeline.prepare_steps(max_images=num_images):
        pass
    pipeline.sample_latents([0] * num_images, seeds=range(num_images), num_inference_steps=2, batch_size=64)
    pipeline.step_bytes(num_images)  # uncaptured, as a step is that would mostly be filling
    pipeline.decode(torch.zeros(4, *pipeline.latent_shape, device="cuda"))
    assert held.is_cuda
