"""If these fail, hours of encoding are lost or mixed, or a model learns latents that no image has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from typer.testing import CliRunner

from model.autoencoder import Autoencoder
from model.cli import app
from model.data.center_crop import decode_image
from model.data.image_batches import DecodedImages, ImageBatches, PlacesViews
from model.data.image_sources import open_image_source
from model.data.latent_shards import INDEX_FILE, LatentShards
from model.data.places import Places
from model.data.prepare_latents import BAD_IMAGES_FILE, PrepareConfig, prepare_latents
from model.lock_file import locked
from tests.image_files import SYNSETS, save_image_folder

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)
    return str(folder)


def images(root: Path) -> ImageBatches:
    return DecodedImages(open_image_source(root), resolution=SIZE, device=CPU, num_threads=2)


def prepare(root: Path, out: Path, autoencoder: str, *, verify: bool = False, **fields: Any) -> None:
    config = PrepareConfig(**({"batch_size": 2, "shard_images": 5} | fields))
    prepare_latents(images(root), out, autoencoder=autoencoder, device=CPU, config=config, verify=verify)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_the_encoded_crops_and_their_mirror_images(tmp_path: Path, autoencoder: str) -> None:
    root = save_image_folder(tmp_path / "train")
    prepare(root, tmp_path / "out", autoencoder)
    source, encoder = open_image_source(root), Autoencoder.load(autoencoder)
    with LatentShards.open(tmp_path / "out") as shards:
        assert len(shards) == 12
        assert shards.labels == SYNSETS
        assert shards.class_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert shards.autoencoder_hash == encoder.weights_hash
        assert shards.resolution == SIZE
        assert shards.index["images_of_class"] == [4, 4, 4]
        for flip in (False, True):
            pixels = np.stack([decode_image(source.read(i), SIZE) for i in range(12)])
            pixels = pixels[:, :, ::-1] if flip else pixels
            x = torch.from_numpy(pixels / 127.5 - 1).float().movedim(-1, 1)
            read = shards.moments(np.arange(12), np.full(12, flip))
            # Half a step of fp16, and the convolutions' own sums in batches of another size.
            torch.testing.assert_close(read.float(), encoder.encode_moments(x), rtol=6e-4, atol=1e-4)


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, autoencoder: str) -> None:
    root = save_image_folder(tmp_path / "train")
    (root / SYNSETS[1] / "broken.jpg").write_bytes(b"no image")
    prepare(root, tmp_path / "one", autoencoder, max_bad_share=0.1)
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(
                prepare, root, tmp_path / "two", autoencoder, rank=rank, world_size=2, max_bad_share=0.1
            )
            for rank in range(2)
        ]
        for rank in ranks:
            rank.result(timeout=60)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, autoencoder: str) -> None:
    """kill -9 in the middle of the second shard, by a source that waits there."""
    root = save_image_folder(tmp_path / "train")
    prepare(root, tmp_path / "whole", autoencoder)
    script = f"""
import time, torch
from pathlib import Path
from model.data.image_batches import DecodedImages
from tests.model.data import test_prepare_latents as t
torch.set_num_threads({torch.get_num_threads()})  # on which the order of a sum depends
original = DecodedImages._batch
def slow(self, span, decoded):
    if span.start >= 7:
        time.sleep(60)
    return original(self, span, decoded)
DecodedImages._batch = slow
t.prepare(Path({str(root)!r}), Path({str(tmp_path / "killed")!r}), {autoencoder!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    )
    record = tmp_path / "killed" / "latents-00000.json"
    deadline = time.monotonic() + 60
    while not record.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = record.with_suffix(".safetensors")
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "killed" / INDEX_FILE).exists()
    (tmp_path / "killed" / ".latents-00001.safetensors.tmp").write_bytes(b"half a shard")
    prepare(root, tmp_path / "killed", autoencoder)
    assert first.stat().st_mtime_ns == written
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_rank_that_is_there_already_is_refused(tmp_path: Path, autoencoder: str) -> None:
    """Two would give their half-written shards the same names."""
    root, out = save_image_folder(tmp_path / "train"), tmp_path / "out"
    out.mkdir()
    with locked(out / ".lock-1") as is_ours:
        assert is_ours
        with pytest.raises(ValueError, match=r"out: .*out is being written to by another process of rank 1"):
            prepare(root, out, autoencoder, rank=1, world_size=2)
    prepare(root, out, autoencoder)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".lock-0")]


def test_sigterm_stops_between_batches(
    tmp_path: Path, autoencoder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = save_image_folder(tmp_path / "train")
    original = DecodedImages._batch

    def terminated(self: DecodedImages, span: range, decoded: Any) -> Any:
        if span.start == 7:
            signal.raise_signal(signal.SIGTERM)
        return original(self, span, decoded)

    with monkeypatch.context() as context, caplog.at_level("INFO"):
        context.setattr(DecodedImages, "_batch", terminated)
        with pytest.raises(SystemExit) as stopped:
            prepare(root, tmp_path / "out", autoencoder)
    assert stopped.value.code == 143
    assert "SIGTERM: stopped with 1 of 3 shards; the same command goes on" in caplog.text
    prepare(root, tmp_path / "out", autoencoder)
    prepare(root, tmp_path / "whole", autoencoder)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bad_images_are_left_out_and_listed(tmp_path: Path, autoencoder: str) -> None:
    root = save_image_folder(tmp_path / "train")
    prepare(root, tmp_path / "clean", autoencoder, batch_size=1, shard_images=100)
    (root / SYNSETS[0] / os.fsdecode(b"aaa\xff.jpg")).write_bytes(b"")  # a name that is not UTF-8
    (root / SYNSETS[2] / "zzz.png").write_bytes(b"<html>")
    (root / SYNSETS[2] / "gone.png").symlink_to(tmp_path / "nowhere")
    # A batch of one image each, as above: sums in batches of other sizes differ in their last bits.
    prepare(root, tmp_path / "out", autoencoder, batch_size=1, max_bad_share=0.2)
    report = os.fsdecode((tmp_path / "out" / BAD_IMAGES_FILE).read_bytes()).splitlines()
    assert [line.split("\t")[0] for line in report] == [
        os.fsdecode(SYNSETS[0].encode() + b"/aaa\xff.jpg"),
        f"{SYNSETS[2]}/gone.png",
        f"{SYNSETS[2]}/zzz.png",
    ]
    assert "not an image, or of an unknown format" in report[2]
    with LatentShards.open(tmp_path / "out") as shards, LatentShards.open(tmp_path / "clean") as clean:
        assert shards.index["num_bad_images"] == 3
        assert np.array_equal(shards.class_ids, clean.class_ids)
        every = (np.arange(12), np.ones(12, bool))
        assert torch.equal(shards.moments(*every), clean.moments(*every))


def test_too_many_bad_images_stop_the_work(tmp_path: Path, autoencoder: str) -> None:
    root = save_image_folder(tmp_path / "train")
    for name in ("a", "b"):
        (root / SYNSETS[1] / f"{name}.jpg").write_bytes(b"no image")
    message = (
        r"max_bad_share: 0.1 given, 1 of 14 images; 2 cannot be read so far, "
        rf"{SYNSETS[1]}/b.jpg the last \(not an image, .*\); all are in .*{BAD_IMAGES_FILE}"
    )
    with pytest.raises(ValueError, match=message):
        prepare(root, tmp_path / "out", autoencoder, max_bad_share=0.1)
    assert len((tmp_path / "out" / BAD_IMAGES_FILE).read_text().splitlines()) == 2
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_several_processes_together_keep_the_share_of_bad_images(tmp_path: Path, autoencoder: str) -> None:
    """One bad image each, where one in all is allowed: none of them goes on, or waits for ever."""
    root = save_image_folder(tmp_path / "train")
    for synset in (SYNSETS[0], SYNSETS[2]):
        (root / synset / "broken.jpg").write_bytes(b"no image")
    fields: dict[str, Any] = {"shard_images": 7, "world_size": 2, "max_bad_share": 0.1}
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(prepare, root, tmp_path / "out", autoencoder, rank=rank, **fields)
            for rank in range(2)
        ]
        for rank in ranks:
            with pytest.raises(ValueError, match=r"0.1 given, 1 of 14 images; 2 cannot be read so far"):
                rank.result(timeout=60)
    assert len((tmp_path / "out" / BAD_IMAGES_FILE).read_text().splitlines()) == 2
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_verify_makes_damaged_shards_again(
    tmp_path: Path, autoencoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = save_image_folder(tmp_path / "train")
    prepare(root, tmp_path / "out", autoencoder)
    before = contents(tmp_path / "out")
    damaged = tmp_path / "out" / "latents-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    prepare(root, tmp_path / "out", autoencoder)  # sizes alone are compared
    assert contents(tmp_path / "out") != before
    with caplog.at_level("WARNING"):
        prepare(root, tmp_path / "out", autoencoder, verify=True)
    assert caplog.text.count("damaged, it is made again") == 1
    assert contents(tmp_path / "out") == before
    damaged.write_bytes(content[:-1])
    prepare(root, tmp_path / "out", autoencoder)
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="verify: given to several processes"):
        prepare(root, tmp_path / "out", autoencoder, verify=True, world_size=2)


def test_a_folder_never_mixes_two_data_sets(tmp_path: Path, autoencoder: str) -> None:
    root = save_image_folder(tmp_path / "train")
    out = tmp_path / "out"
    prepare(root, out, autoencoder)
    before = contents(out)
    with pytest.raises(ValueError, match="holds latents made with batch_size 2; 3 given"):
        prepare(root, out, autoencoder, batch_size=3)
    with pytest.raises(ValueError, match="holds latents made with dtype float32; bfloat16 given"):
        prepare(root, out, autoencoder, dtype="bfloat16")
    other = save_image_folder(tmp_path / "other", classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="made with a list of images, sizes and labels with the digest"):
        prepare(other, out, autoencoder)
    assert contents(out) == before


def test_work_that_cannot_end_well_is_refused(
    tmp_path: Path, autoencoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = save_image_folder(tmp_path / "train", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: .*file cannot be made"):
        prepare(root, tmp_path / "file", autoencoder)
    odd = DecodedImages(open_image_source(root), resolution=15, device=CPU, num_threads=1)
    with pytest.raises(ValueError, match="resolution: 15 given; a multiple of 2 is accepted"):
        prepare_latents(odd, tmp_path / "out", autoencoder=autoencoder, device=CPU)
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(free=6143))
    # 3 images, 2 flips, 8 channels of 8 x 8 in fp16
    with pytest.raises(ValueError, match=r"has 0.0 GB free; 0.0 GB are needed for 3 images"):
        prepare(root, tmp_path / "out", autoencoder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(free=6144))
    prepare(root, tmp_path / "out", autoencoder)


def test_moments_that_are_not_finite_are_refused(tmp_path: Path, autoencoder: str) -> None:
    module = AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False)
    with torch.no_grad():
        module.quant_conv.weight.mul_(1e6)
    module.save_pretrained(tmp_path / "large")
    root = save_image_folder(tmp_path / "train", 1)
    with pytest.raises(ValueError, match="moments of images 0 to 1 of the source are not finite in fp16"):
        prepare(root, tmp_path / "out", str(tmp_path / "large"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "dtype: float16 given; one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size: 0 given"),
        ({"shard_images": 0}, "shard_images: 0 given"),
        ({"max_bad_share": 1.5}, "max_bad_share: 1.5 given"),
        ({"rank": 2, "world_size": 2}, "rank: 2 given; 0 to 1"),
    ],
)
def test_prepare_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**fields)


def test_places_go_the_same_way(tmp_path: Path, autoencoder: str) -> None:
    places = Places.load()
    views = PlacesViews(places, resolution=SIZE, num_views=5)
    prepare_latents(views, tmp_path, autoencoder=autoencoder, device=CPU, config=PrepareConfig(batch_size=5))
    rendered, labels = places.render(torch.arange(5), SIZE)
    with LatentShards.open(tmp_path) as shards:
        assert shards.labels == places.labels
        assert shards.class_ids.tolist() == labels.tolist()
        mirrored = Autoencoder.load(autoencoder).encode_moments(rendered.flip(-1))
        read = shards.moments(np.arange(5), np.ones(5, bool))
        torch.testing.assert_close(read.float(), mirrored, rtol=6e-4, atol=1e-4)


def test_the_command_prepares_and_refuses(tmp_path: Path, autoencoder: str) -> None:
    root = save_image_folder(tmp_path / "train", 2)
    command = ["prepare-latents", str(root), str(tmp_path / "out"), "--resolution", "16"]
    command += ["--autoencoder", autoencoder, "--labels", "imagenet", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "ready for `lamamba train`" in result.output
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["labels"] == ["tench", "goldfish", "great white shark"]
    for options, message in (
        (["--views", "3"], "views: 3 given for"),
        (["--decode-threads", "0"], "decode_threads: 0 given"),
        (["--resolution", "32"], "holds latents made with resolution 16; 32 given"),
        (["--labels", str(tmp_path / "absent")], "labels: .*absent cannot be read"),
    ):
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 2
        assert message.replace(".*", str(tmp_path) + "/") in refused.stderr.replace("\n", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_writes_the_same_bytes_again_and_nearly_those_of_the_cpu(
    tmp_path: Path, autoencoder: str
) -> None:
    root, device = save_image_folder(tmp_path / "train"), torch.device("cuda")
    prepare(root, tmp_path / "cpu", autoencoder)
    for name in ("cuda", "again"):
        decoded = DecodedImages(open_image_source(root), resolution=SIZE, device=device, num_threads=2)
        config = PrepareConfig(batch_size=2, shard_images=5)
        prepare_latents(decoded, tmp_path / name, autoencoder=autoencoder, device=device, config=config)
    assert contents(tmp_path / "cuda") == contents(tmp_path / "again")
    every = (np.arange(12), np.zeros(12, bool))
    with LatentShards.open(tmp_path / "cuda") as shards, LatentShards.open(tmp_path / "cpu") as expected:
        # TF32 keeps ten bits of a factor.
        torch.testing.assert_close(shards.moments(*every), expected.moments(*every), rtol=0, atol=2e-2)
