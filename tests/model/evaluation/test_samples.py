"""If this fails, hours of sampling are lost, or numbers are of other images than their record says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from model.evaluation import samples as samples_module
from model.evaluation.ranks import Ranks
from model.evaluation.samples import SampleFile, SamplePlan, require_disk_space
from model.pipeline import LaMambaPipeline
from service.benchmark.server import free_port
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), depths=(1, 1, 1, 0))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LaMambaPipeline:
    return LaMambaPipeline.load(folder, device="cpu")


def _plan(**fields: Any) -> SamplePlan:
    plan: dict[str, Any] = {
        "num": 11,
        "classes": "balanced",
        "guidance_scale": 2.0,
        "guidance_interval": None,
    }
    return SamplePlan(**{**plan, "sampler": "ddim", "num_inference_steps": 2, "seed": 5, **fields})


def _make(file: SampleFile, *, batch_size: int = 3, fixed_shapes: bool = False) -> Any:
    return file.make(ranks=Ranks(), batch_size=batch_size, fixed_shapes=fixed_shapes, progress=None)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "_LEAST_PART", 1)


def test_samples_are_an_archive_as_adm_writes_it(pipeline: LaMambaPipeline, tmp_path: Path) -> None:
    images = _make(SampleFile(tmp_path, _plan(), pipeline))
    with np.load(tmp_path / "samples-cfg2.npz") as archive:
        assert list(archive) == ["arr_0", "arr_1"]
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert (pixels.dtype, pixels.shape) == (np.uint8, (11, 16, 16, 3))
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 3 for i in range(11)]
    expected = pipeline.generate(
        [7 % 3],
        seeds=[5],
        image_indices=[7],
        guidance_scale=2,
        num_inference_steps=2,
        sampler="ddim",
    )
    assert np.abs(pixels[7].astype(int) - expected[0].numpy().astype(int)).max() <= 1
    assert images.num == 11
    record = json.loads((tmp_path / "samples-cfg2.json").read_text())
    assert (record["seed"], record["weights"], record["sampler"]) == (5, pipeline.weights_hash, "ddim")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-cfg2.json", "samples-cfg2.npz"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_is_the_same_whatever_the_batch(
    guidance_scale: float, pipeline: LaMambaPipeline, tmp_path: Path
) -> None:
    plan, found = _plan(guidance_scale=guidance_scale, classes="random"), []
    for batch_size, fixed_shapes in ((16, False), (4, True)):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        images = _make(SampleFile(folder, plan, pipeline), batch_size=batch_size, fixed_shapes=fixed_shapes)
        ((pixels, labels),) = images.batches(range(11))
        found.append((pixels.int(), labels))
    (one, labels), (other, other_labels) = found
    assert torch.equal(labels, other_labels)
    assert len(set(labels.tolist())) == 3
    assert (one - other).abs().max() <= 1  # batches of other sizes round differently


def test_random_classes_are_drawn_for_each_image(pipeline: LaMambaPipeline) -> None:
    labels = _plan(classes="random").class_labels(range(3000), pipeline)
    counts = np.bincount(labels, minlength=3)
    assert (np.abs(counts - 1000) < 100).all()
    assert _plan(classes="random").class_labels(range(7, 20), pipeline) == labels[7:20]
    assert _plan(classes="random", seed=6).class_labels(range(3000), pipeline) != labels


def _interrupted_after(calls: int, made: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def generate(*args: Any, **fields: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return made(*args, **fields)

    return generate


def test_the_same_command_goes_on_after_a_kill(
    pipeline: LaMambaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are there are not made again, a half-written one is; the bytes are those of one go."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    _make(SampleFile(straight, _plan(), pipeline))
    made = LaMambaPipeline.generate
    with monkeypatch.context() as patch:
        patch.setattr(LaMambaPipeline, "generate", _interrupted_after(2, made))
        with pytest.raises(KeyboardInterrupt):
            _make(SampleFile(broken, _plan(), pipeline))
    parts = broken / "samples-cfg2.parts"
    assert sorted(path.name for path in parts.iterdir()) == ["part-000000.npy", "part-000001.npy"]
    (parts / ".part-000002.npy.tmp").write_bytes(b"half of it")
    with monkeypatch.context() as patch:
        patch.setattr(LaMambaPipeline, "generate", _interrupted_after(2, made))  # two are missing
        _make(SampleFile(broken, _plan(), pipeline), batch_size=3)
    assert (broken / "samples-cfg2.npz").read_bytes() == (straight / "samples-cfg2.npz").read_bytes()
    assert not parts.exists()
    with monkeypatch.context() as patch:
        patch.setattr(LaMambaPipeline, "generate", _interrupted_after(0, made))
        assert _make(SampleFile(broken, _plan(), pipeline)).num == 11


def test_other_settings_are_refused_and_not_mixed(pipeline: LaMambaPipeline, tmp_path: Path) -> None:
    _make(SampleFile(tmp_path, _plan(), pipeline))
    with pytest.raises(
        ValueError, match=r"output_dir: .*samples-cfg2 was begun with seed 5, 6 given; the same"
    ):
        SampleFile(tmp_path, _plan(seed=6), pipeline).check()
    (tmp_path / "samples-cfg2.json").unlink()
    with pytest.raises(ValueError, match=r"output_dir: .*samples-cfg2\.json is missing beside the images"):
        SampleFile(tmp_path, _plan(), pipeline).check()


def test_a_full_disk_is_noticed_before_the_work(
    pipeline: LaMambaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [SampleFile(tmp_path, _plan(num=50_000, guidance_scale=s), pipeline) for s in (1.0, 2.0)]
    assert files[0].num_bytes == 50_000 * 16 * 16 * 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * files[0].num_bytes))
    require_disk_space(tmp_path, files)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * files[0].num_bytes - 1))
    with pytest.raises(
        ValueError, match=r"output_dir: .* has 0\.1 GiB free; 0\.1 GiB are needed for 100,000"
    ):
        require_disk_space(tmp_path, files)


_RANK_ENDS_S = 60


def _environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun sets it for the ranks of one node."""
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _second_rank(_: int, port: int, folder: Path, output_dir: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= _environment(1, port)
    samples_module._LEAST_PART = 1
    file = SampleFile(output_dir, _plan(), LaMambaPipeline.load(folder, device="cpu"))
    with Ranks.joined() as ranks:
        file.make(ranks=ranks, batch_size=3, fixed_shapes=False, progress=None)
        assert ranks.gathered(ranks.share(7)) == []
        with pytest.raises(ValueError, match="num: wrong"):
            ranks.from_main(lambda: None)


def _refuse() -> None:
    raise ValueError("num: wrong")


def test_two_ranks_make_the_file_of_one(
    pipeline: LaMambaPipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what rank 0 refuses, all refuse."""
    one, two = tmp_path / "one", tmp_path / "two"
    for output_dir in (one, two):
        output_dir.mkdir()
    port, threads = free_port(), torch.get_num_threads()
    second = mp.spawn(_second_rank, (port, folder, two), join=False)
    torch.set_num_threads(1)  # as the other rank has
    try:
        _make(SampleFile(one, _plan(), pipeline))
        for key, value in _environment(0, port).items():
            monkeypatch.setenv(key, value)
        with Ranks.joined() as ranks:
            SampleFile(two, _plan(), pipeline).make(
                ranks=ranks, batch_size=3, fixed_shapes=False, progress=None
            )
            assert ranks.gathered(ranks.share(7)) == [range(3), range(3, 7)]
            with pytest.raises(ValueError, match="num: wrong"):
                ranks.from_main(_refuse)
        assert second.join(timeout=_RANK_ENDS_S)
    finally:
        torch.set_num_threads(threads)
        for process in second.processes:
            process.terminate()
    assert (two / "samples-cfg2.npz").read_bytes() == (one / "samples-cfg2.npz").read_bytes()
