"""If this fails, a model folder does not load, or a seed no longer fixes an image."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from model.cli import app
from model.diffusion.samplers import sampler_table
from model.model_folder import (
    add_guidance_network,
    load_network,
    read_model_index,
    save_model_folder,
    weights_hash,
)
from model.network.dit import DiT
from model.network.lamamba import LaMambaDiff
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from tests.fakes import fake_pipeline
from tests.tiny_model import LABELS, save_autoguided_model, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


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


def test_a_loaded_model_does_not_follow_its_files(folder: Path, tmp_path: Path) -> None:
    """A server's model is replaced by writing over its folder, and may have to be served on."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    pipeline = LaMambaPipeline.load(copy, device="cpu")
    before = pipeline.generate([1], seeds=[3], num_inference_steps=2)
    for file in copy.rglob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(b"\x11" * file.stat().st_size)
    assert torch.equal(pipeline.generate([1], seeds=[3], num_inference_steps=2), before)


def test_a_dit_in_the_folder_samples_like_ours(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DiT(sample_size=8, hidden_size=16, num_layers=1, num_heads=2, num_classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model_folder(tmp_path, network=network, autoencoder=folder / "vae", labels=LABELS, name="peer")
    loaded = LaMambaPipeline.load(tmp_path, device="cpu")
    assert (loaded.num_classes, loaded.latent_shape, loaded.scan_backend) == (3, (4, 8, 8), "none")
    images = loaded.generate([0, 1], seeds=[3, 3], num_inference_steps=2)
    assert images.shape == (2, 16, 16, 3)
    assert not torch.equal(*images)
    assert isinstance(DiTPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False).transformer, DiT)


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


def test_a_model_with_a_guidance_network_steps_away_from_that(
    folder: Path, pipeline: LaMambaPipeline, tmp_path: Path
) -> None:
    autoguided = LaMambaPipeline.load(save_autoguided_model(tmp_path / "other"), device="cpu")
    assert autoguided.weights_hash != pipeline.weights_hash
    arguments: dict[str, Any] = {"class_labels": [1], "seeds": [3], "num_inference_steps": 3}
    images = [p.sample_latents(guidance_scale=4.0, **arguments) for p in (pipeline, autoguided)]
    assert not torch.equal(*images)
    images = [p.sample_latents(guidance_scale=1.0, **arguments) for p in (pipeline, autoguided)]
    assert torch.equal(*images)  # unguided, it is not asked
    with_itself = tmp_path / "itself"
    shutil.copytree(folder, with_itself)
    add_guidance_network(with_itself, folder)
    itself = LaMambaPipeline.load(with_itself, device="cpu", num_row_threads=2)
    images = [p.sample_latents(guidance_scale=s, **arguments) for p, s in ((itself, 4.0), (pipeline, 1.0))]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)  # from what is equal no scale steps away


def test_fixed_rows_of_an_autoguided_model_are_each_networks(tmp_path: Path) -> None:
    loaded = LaMambaPipeline.load(save_autoguided_model(tmp_path), device="cpu", fixed_rows=4)
    assert (loaded.num_rows(3, 2), loaded.num_rows(5, 0), loaded.num_rows(5, 5)) == (8, 8, 16)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    crowd = loaded.sample_latents([0, 1, 2], seeds=[1, 2, 3], **arguments)
    assert torch.equal(loaded.sample_latents([2], seeds=[3], **arguments), crowd[2:])


def test_the_command_adds_a_guidance_network(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    done = CliRunner().invoke(app, ["add-guidance", str(copy), str(folder)])
    assert done.output == f"{copy}: guided by {folder}\n"
    assert read_model_index(copy).has_guidance_network
    missing = CliRunner().invoke(app, ["add-guidance", str(tmp_path / "none"), str(folder)])
    assert (missing.exit_code, "no such model folder" in missing.output) == (2, True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_classes": 2}, "the guidance network's num_classes is 2; the model's, 3, is accepted"),
        ({"sample_size": 16}, "the guidance network's sample_size is 16; the model's, 8, is accepted"),
    ],
    ids=["classes", "size"],
)
def test_a_guidance_network_must_fit_the_model(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    network = LaMambaDiff(**{"sample_size": 8, "hidden_size": 8, "num_heads": 2, "num_classes": 3} | config)
    network.save_pretrained(tmp_path / "small" / "transformer")
    with pytest.raises(ValueError, match=message):
        add_guidance_network(copy, tmp_path / "small")
    assert not read_model_index(copy).has_guidance_network
    shutil.copytree(tmp_path / "small" / "transformer", copy / "guidance_transformer")
    index = json.loads((copy / "model_index.json").read_text())
    index["lamamba"]["guidance_network"] = True
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        LaMambaPipeline.load(copy, device="cpu")
    shutil.rmtree(copy / "guidance_transformer")
    with pytest.raises(ValueError, match="guidance_transformer: the network cannot be loaded"):
        LaMambaPipeline.load(copy, device="cpu")


def test_a_guidance_network_is_of_the_models_classes_and_autoencoder(folder: Path, tmp_path: Path) -> None:
    """As many classes in another order would be guided away from others; another's latents mean nothing."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    before = weights_hash(copy)
    other = save_tiny_model(tmp_path / "other", labels=[LABELS[0], *LABELS[:0:-1]])
    message = f"other/model: the guidance network's class 1 is '{LABELS[2]}'; the model's, '{LABELS[1]}', is"
    with pytest.raises(ValueError, match=message):
        add_guidance_network(copy, other)
    index = json.loads((folder / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(
        ValueError, match=r"the guidance network's autoencoder has the hash \w{12}; the model"
    ):
        add_guidance_network(copy, other)
    assert weights_hash(copy) == before
    shutil.rmtree(other / "vae")  # of a network alone nobody can tell
    add_guidance_network(copy, other)


def test_a_guidance_network_replaces_another_and_goes_with_its_model(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, guidance = tmp_path / "model", tmp_path / "model" / "guidance_transformer"
    shutil.copytree(folder, copy)
    add_guidance_network(copy, folder)
    expected = weights_hash(copy)
    shutil.copy(guidance / "diffusion_pytorch_model.safetensors", guidance / "of-2-00002.safetensors")
    add_guidance_network(copy, folder)
    assert weights_hash(copy) == expected
    add_guidance_network(copy, guidance)  # itself
    assert weights_hash(copy) == expected
    assert sorted(path.name for path in copy.iterdir() if path.name[0] == ".") == []
    network = load_network(folder)
    save_model_folder(copy, network=network, autoencoder=folder / "vae", labels=LABELS, name="new")
    assert not guidance.exists()
    assert caplog.messages == [f"{guidance}: removed, it guided the weights that were here before"]


def test_generate_splits_into_batches_and_reports_each_step(pipeline: LaMambaPipeline) -> None:
    seen: list[int] = []
    images = pipeline.generate(
        [0, 1, 2], seeds=[1, 2, 3], num_inference_steps=2, batch_size=2, progress=seen.append
    )
    assert images.shape[0] == 3
    assert seen == [2, 2, 1, 1]


@pytest.mark.parametrize(("resolution", "dtype"), [(128, "float16"), (256, "float16"), (None, "bfloat16")])
def test_a_model_says_what_gpus_run_it_in(folder: Path, resolution: int | None, dtype: str) -> None:
    path = default_model_dir(resolution) if resolution else folder
    assert read_model_index(path).gpu_dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_load_on_cuda_takes_the_dtype_of_the_model(folder: Path) -> None:
    assert LaMambaPipeline.load(folder, device="cuda").dtype == torch.bfloat16
    shipped = LaMambaPipeline.load(default_model_dir(128), device="cuda")
    assert (shipped.dtype, shipped.network.dtype) == (torch.float16, torch.float16)


def test_guidance_scale_changes_the_image_and_one_turns_it_off(pipeline: LaMambaPipeline) -> None:
    images = [
        pipeline.generate([1], seeds=[3], num_inference_steps=3, guidance_scale=scale) for scale in (1.0, 4.0)
    ]
    assert not torch.equal(*images)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_guidance_outside_of_its_interval_is_none_and_costs_no_row(sampler: str) -> None:
    pipeline = fake_pipeline()
    network: Any = pipeline.network

    def made(**options: Any) -> tuple[Tensor, list[int]]:
        network.rows_of_calls.clear()
        latents = pipeline.sample_latents(
            [1, 2], seeds=[0, 1], num_inference_steps=10, sampler=sampler, **options
        )
        return latents, list(network.rows_of_calls)

    plain, _ = made(guidance_scale=1.0)
    full, rows = made(guidance_scale=3.0)
    assert rows == [4] * 10
    torch.testing.assert_close(made(guidance_scale=3.0, guidance_interval=(0, 999))[0], full, rtol=0, atol=0)
    none, rows = made(guidance_scale=3.0, guidance_interval=(1, 1))  # between two steps
    assert rows == [2] * 10
    torch.testing.assert_close(none, plain, rtol=0, atol=0)
    some, rows = made(guidance_scale=3.0, guidance_interval=(300, 700))
    inside = [300 <= t <= 700 for t in sampler_table(sampler, 10, pipeline.schedule).timesteps.tolist()]
    assert rows == [4 if guided else 2 for guided in inside]
    assert min(float((some - other).abs().max()) for other in (plain, full)) > 1e-3


def test_an_interval_that_the_process_has_not_is_refused_before_anything_runs() -> None:
    pipeline = fake_pipeline()
    network: Any = pipeline.network
    with pytest.raises(ValueError, match="guidance_interval: 700 to 300 given"):
        pipeline.generate([0], seeds=[0], guidance_interval=(700, 300))
    assert network.rows_of_calls == []


@pytest.mark.parametrize("name", ["blue house", " Blue House ", 1, "1"], ids=repr)
def test_class_index_takes_numbers_and_names(pipeline: LaMambaPipeline, name: int | str) -> None:
    assert pipeline.class_index(name) == 1


def test_label_index_finds_what_class_index_takes_and_nothing_else(pipeline: LaMambaPipeline) -> None:
    assert [pipeline.label_index(text) for text in (" Blue House ", "1")] == [1, 1]
    assert [pipeline.label_index(text) for text in ("blue horse", "3", "-1", "\u0661")] == [None] * 4


def test_of_two_classes_of_one_name_the_first_is_meant(pipeline: LaMambaPipeline) -> None:
    assert replace(pipeline, labels=("a", "b", "B")).class_index("b") == 1


@pytest.mark.parametrize(
    ("class_id", "message"),
    [
        (3, "class_id: 3 given; this model accepts 0 to 2"),
        (-1, "class_id: -1 given; this model accepts 0 to 2"),
        ("\u0663", "the nearest of 3 classes are"),
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


def _edit_index(**entries: object) -> object:
    def edit(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def _empty_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")


def _truncate_autoencoder(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _widen(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 16}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("model_index.json"), "model_index.json cannot be read"),
        (_drop("transformer/config.json"), "the network cannot be loaded"),
        (_drop("vae/diffusion_pytorch_model.safetensors"), "autoencoder: "),
        (
            _truncate,
            "transformer: the network cannot be loaded: diffusion_pytorch_model.safetensors is damaged",
        ),
        (_truncate_autoencoder, "vae: the autoencoder cannot be loaded: .* is damaged: .* header"),
        (_empty_index, "not a model folder, model_index.json has no _class_name, transformer, vae"),
        (_edit_index(lamamba=[]), r"lamamba: \[\] given; an object is accepted"),
        (_edit_index(lamamba={"name": 3}), "lamamba.name: 3 given; a name is accepted"),
        (
            _edit_index(lamamba={"guidance_scale": 50}),
            "lamamba.guidance_scale: 50 given; 1 to 20 is accepted",
        ),
        (_edit_index(lamamba={"guidance_scale": "2"}), 'lamamba.guidance_scale: "2" given; 1 to 20'),
        (_edit_index(lamamba={"guidance_scale": float("nan")}), "lamamba.guidance_scale: NaN given"),
        (
            _edit_index(lamamba={"gpu_dtype": "half"}),
            'lamamba.gpu_dtype: "half" given; one of bfloat16, float16',
        ),
        (_edit_index(lamamba={"guidance_channels": "x"}), 'lamamba.guidance_channels: "x" given; null or'),
        (_edit_index(lamamba={"guidance_channels": 5}), "lamamba.guidance_channels: 5 given; null or 1 to 4"),
        (_edit_index(id2label=["a", "b", "c"]), r'id2label: \["a", "b", "c"\] given; an object'),
        (_edit_index(id2label={"0": 1}), "id2label.0: 1 given; a name is accepted"),
        (_widen, "the network cannot be loaded"),
        (_rename_label, "model_index.json labels 3 classes"),
    ],
    ids=[
        "no-index",
        "no-config",
        "no-vae",
        "truncated",
        "truncated-vae",
        "empty-index",
        "lamamba",
        "name",
        "scale",
        "scale-text",
        "scale-nan",
        "gpu-dtype",
        "channels",
        "channels-many",
        "labels-list",
        "label-number",
        "mismatch",
        "labels",
    ],
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
    assert str(copy) in str(caught.value)


def test_load_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder"):
        LaMambaPipeline.load(tmp_path / "absent")


def test_load_needs_no_scheduler_which_diffusers_alone_reads(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "scheduler")
    assert LaMambaPipeline.load(copy, device="cpu").labels == LABELS


def test_load_leaves_the_libraries_logging_as_it_was_and_lets_them_repeat_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    level = logging.getLogger("diffusers").level
    with pytest.raises(ValueError, match="the network cannot be loaded"):
        LaMambaPipeline.load(copy, device="cpu")
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")
    assert logging.getLogger("diffusers").level == level


def test_load_refuses_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="device: 'bogus' given; cpu, cuda or cuda:N is accepted"):
        LaMambaPipeline.load(folder, device="bogus")


@pytest.mark.parametrize("label", [-1, 4, 1000, 1.5], ids=str)
def test_generate_refuses_labels_before_anything_runs(pipeline: LaMambaPipeline, label: int) -> None:
    with pytest.raises(
        ValueError, match=f"class_labels: {label} given; this model accepts 0 to 2, and 3 for"
    ):
        pipeline.generate([0, label], seeds=[1, 2], progress=lambda steps: pytest.fail("it ran"))


def test_generate_takes_the_null_label_and_as_many_seeds_as_labels(pipeline: LaMambaPipeline) -> None:
    assert pipeline.generate([3], seeds=[1], num_inference_steps=1).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="seeds: 1 given; one a label, 2, is accepted"):
        pipeline.generate([0, 1], seeds=[1])
    with pytest.raises(ValueError, match="class_labels: none given"):
        pipeline.generate([], seeds=[])
