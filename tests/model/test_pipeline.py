"""If this fails, a model folder does not load, or a seed no longer fixes an image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline

from model.network.lamamba import LaMambaDiff
from model.pipeline import LaMambaPipeline, save_model_folder

LABELS = ("red barn", "blue house", "green hill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model: 16 px images, 8x8 latents under an f2 autoencoder."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tiny")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **_two_levels(), latent_channels=4
    )
    vae.save_pretrained(root / "vae")
    network = LaMambaDiff(sample_size=8, hidden_size=8, num_heads=2, num_classes=3)
    for parameter in network.parameters():
        # The zero-initialised modulations would hide the label and the timestep from the output.
        torch.nn.init.normal_(parameter, std=0.1)
    save_model_folder(
        root / "model",
        network=network,
        autoencoder=root / "vae",
        labels=LABELS,
        name="tiny",
        dtype=torch.float32,
    )
    return root / "model"


def _two_levels() -> dict[str, tuple[str, ...]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LaMambaPipeline:
    return LaMambaPipeline.load(folder, device="cpu")


def test_load_reports_what_it_runs(pipeline: LaMambaPipeline) -> None:
    assert (pipeline.name, pipeline.resolution, pipeline.num_classes) == ("tiny", 16, 3)
    assert pipeline.latent_shape == (4, 8, 8)
    assert pipeline.labels == LABELS
    assert (pipeline.scan_backend, pipeline.dtype) == ("vectorized", torch.float32)
    assert len(pipeline.weights_hash) == 12


def test_load_of_half_precision_weights_computes_in_fp32_on_cpu(folder: Path, tmp_path: Path) -> None:
    network = LaMambaDiff(sample_size=8, hidden_size=8, num_heads=2, num_classes=3)
    save_model_folder(tmp_path, network=network, autoencoder=folder / "vae", labels=LABELS, name="half")
    loaded = LaMambaPipeline.load(tmp_path, device="cpu").network
    expected = network.state_dict()["encoder.0.0.ffn.0.weight"].bfloat16().float()
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.state_dict()["encoder.0.0.ffn.0.weight"], expected)


def test_a_diffusers_pipeline_loads_the_folder(folder: Path) -> None:
    loaded = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert isinstance(loaded.transformer, LaMambaDiff)
    assert loaded.labels["blue house"] == 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_generate_gives_an_image_the_same_alone_as_in_a_batch(
    pipeline: LaMambaPipeline, sampler: str
) -> None:
    arguments = {"num_inference_steps": 4, "sampler": sampler, "guidance_scale": 2.0}
    crowd = pipeline.generate([0, 1, 2, 1], seeds=[5, 6, 6, 6], image_indices=[0, 0, 1, 2], **arguments)
    alone = pipeline.generate([2], seeds=[6], image_indices=[1], **arguments)
    assert crowd.shape == (4, 16, 16, 3)
    # Sums run in another order in another batch: at most the last bit of a channel.
    assert int((crowd[2].int() - alone[0].int()).abs().max()) <= 1
    assert not torch.equal(crowd[1], crowd[3])


def test_generate_splits_into_batches_and_reports_each_step(pipeline: LaMambaPipeline) -> None:
    seen: list[int] = []
    images = pipeline.generate(
        [0, 1, 2], seeds=[1, 2, 3], num_inference_steps=2, batch_size=2, progress=seen.append
    )
    assert images.shape[0] == 3
    assert seen == [2, 2, 1, 1]


def test_guidance_scale_changes_the_image_and_one_turns_it_off(pipeline: LaMambaPipeline) -> None:
    images = [
        pipeline.generate([1], seeds=[3], num_inference_steps=3, guidance_scale=scale) for scale in (1.0, 4.0)
    ]
    assert not torch.equal(*images)


@pytest.mark.parametrize("name", ["blue house", " Blue House ", 1, "1"], ids=repr)
def test_class_index_takes_numbers_and_names(pipeline: LaMambaPipeline, name: int | str) -> None:
    assert pipeline.class_index(name) == 1


@pytest.mark.parametrize(
    ("class_id", "message"),
    [
        (3, "class_id: 3 given; this model accepts 0 to 2"),
        (-1, "class_id: -1 given; this model accepts 0 to 2"),
        ("blue horse", "the nearest of 3 classes are 'blue house'"),
    ],
    ids=repr,
)
def test_class_index_refuses_with_what_is_accepted(
    pipeline: LaMambaPipeline, class_id: int | str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.class_index(class_id)


def _drop(path: str) -> object:
    return lambda folder: (folder / path).unlink()


def _truncate(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _rename_label(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"]["7"] = index["id2label"].pop("2")
    (folder / "model_index.json").write_text(json.dumps(index))


def _widen(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 16}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("model_index.json"), "model_index.json cannot be read"),
        (_drop("transformer/config.json"), "the network cannot be loaded"),
        (_drop("vae/diffusion_pytorch_model.safetensors"), "autoencoder: "),
        (_truncate, "the network cannot be loaded"),
        (_widen, "the network cannot be loaded"),
        (_rename_label, "model_index.json labels 3 classes"),
    ],
    ids=["no-index", "no-config", "no-vae", "truncated", "mismatch", "labels"],
)
def test_load_refuses_a_damaged_folder_in_one_line(
    folder: Path, tmp_path: Path, damage: object, message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert callable(damage)
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        LaMambaPipeline.load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_load_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder"):
        LaMambaPipeline.load(tmp_path / "absent")
