"""If these fail, an image decoded beside others is another one, or shows another request's pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.autoencoder import to_pixels
from model.captured_decoder import CapturedDecoder
from model.cuda_graph import Captures
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from tests.fakes import fake_pipeline

SHAPE = (4, 8, 8)


def replayed(self: Captures, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In a graph's place: each call runs the function again and overwrites what the last one returned."""
    result = step()
    return lambda: result.copy_(step())


def decode(latents: Tensor) -> Tensor:
    """Like a decoder, a function of each image alone."""
    return to_pixels(torch.tanh(latents[:, :3]).repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> CapturedDecoder:
    monkeypatch.setattr(Captures, "capture", replayed)
    return CapturedDecoder(decode, latent_shape=SHAPE, device=torch.device("cpu"), sizes=(4, 1, 2))


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5, 11])
def test_any_number_of_images_is_decoded(decoder: CapturedDecoder, num_images: int) -> None:
    for seed in range(2):  # the second time over what the first has left behind
        latents = torch.randn(num_images, *SHAPE, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(decoder(latents), decode(latents))


def test_what_was_returned_is_not_overwritten(decoder: CapturedDecoder) -> None:
    first = decoder(torch.zeros(1, *SHAPE))
    kept = first.clone()
    decoder(torch.ones(1, *SHAPE))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("sizes", "captured"), [((1, 2, 4), [4, 2, 1]), ((1, 2), [2, 1]), ((1,), [1])], ids=str
)
def test_each_size_is_prepared_once_the_largest_first(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], captured: list[int]
) -> None:
    batches = []

    def counted(latents: Tensor) -> Tensor:
        batches.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(Captures, "capture", lambda self, step: step)
    pipeline = fake_pipeline()
    decoder = CapturedDecoder(
        counted, latent_shape=pipeline.latent_shape, device=pipeline.device, sizes=sizes
    )
    for _ in replace(pipeline, captured_decoder=decoder).prepare_decode(max_images=3):
        pass
    assert batches == captured


def test_without_graphs_each_number_of_images_is_prepared_that_is_decoded_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = []

    def counted(latents: Tensor) -> Tensor:
        batches.append(len(latents))
        return torch.zeros(len(latents), 1, 1, 3)

    pipeline = fake_pipeline()
    monkeypatch.setattr(pipeline.autoencoder, "pixels", counted)
    for device in ("cpu", "meta"):  # which stands for a GPU
        for _ in replace(pipeline, device=torch.device(device)).prepare_decode(max_images=3):
            pass
    assert batches == [1, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_pixels_are_those_of_the_decoder_itself() -> None:
    captured, plain = (
        LaMambaPipeline.load(default_model_dir(128), device="cuda", cuda_graphs=graphs)
        for graphs in (True, False)
    )
    latents = torch.randn(7, 4, 16, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert captured.captured_decoder is not None
    for part in (latents[:1], latents[:3], latents):
        # Another batch size may take another convolution algorithm: fp16's rounding of a pixel value.
        difference = captured.decode(part).int() - plain.decode(part).int()
        assert difference.abs().max() <= 2
