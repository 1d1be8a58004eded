"""If this fails, the commands of docs/training.md have nothing to be tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fake_imagenet
from model.data.image_sources import open_image_source


@pytest.mark.parametrize("layout", [[], ["--tar"]], ids=["folders", "tar"])
def test_fake_imagenet_is_a_source(
    tmp_path: Path, layout: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_imagenet, "SHAPES", ((50, 40), (40, 50)))
    fake_imagenet.main([str(tmp_path / "fake"), "--classes", "22", "--images", "2", *layout])
    source = open_image_source(tmp_path / "fake", "imagenet")
    assert source.labels[1] == "goldfish"
    assert source.class_ids.tolist() == [class_id for class_id in range(22) for _ in range(2)]
    assert len({source.read(index) for index in range(len(source))}) == 44
