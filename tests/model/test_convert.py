"""If this fails, weights trained with the authors' code cannot be brought here, or come as another network,
or a hostile file runs code.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from torch import Tensor

from model.authors_format import from_authors, infer_config, to_authors
from model.config import LaMambaConfig
from model.convert import convert_checkpoint, export_checkpoint
from model.model_folder import read_model_index
from model.network.lamamba import LaMambaDiff
from tests.golden_networks import MAX_ABS, load_golden

LABELS = ["wharf", "church", "old hall", "roof", "studio"]
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "hidden_size": 8,
    "num_heads": 2,
    "window_size": 4,
    "num_classes": 5,
    "depths": (2, 1, 1, 0),  # with a shifted block
}


class CfgNode(dict):
    """Stands in for yacs' class: a dict whose attributes are pickled beside its items."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__({key: CfgNode(v) if isinstance(v, dict) else v for key, v in fields.items()})
        self.__dict__["__immutable__"] = True


CfgNode.__module__ = "yacs.config"


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `yacs.config` to pickle CfgNode from; it is gone when the checkpoint is read."""
    package, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]  # a module made for the test
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    yield
    monkeypatch.undo()


@pytest.fixture
def checkpoint(tmp_path: Path, yacs: None) -> Path:
    """A checkpoint as the authors' trainer writes it: the golden EMA weights, and others as `model`."""
    golden = load_golden("authors-checkpoint")
    ema = collections.OrderedDict(golden.weights)
    model = collections.OrderedDict(
        (key, value * 1.5 if value.is_floating_point() and "attn_mask" not in key else value)
        for key, value in ema.items()
    )
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    contents = {
        "model": model,
        "ema": ema,
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(**json.loads(golden.metadata["args"])),
        "config": CfgNode(json.loads(golden.metadata["stored_config"])),
    }
    torch.save(contents, tmp_path / "0050000.pt")
    sys.modules.pop("yacs.config")
    sys.modules.pop("yacs")
    return tmp_path / "0050000.pt"


def loaded(folder: Path) -> LaMambaDiff:
    return LaMambaDiff.from_pretrained(folder, subfolder="transformer", low_cpu_mem_usage=False).eval()


def authors_weights(**fields: Any) -> dict[str, Tensor]:
    """The authors' state dict of a small network with random weights."""
    torch.manual_seed(0)
    network = LaMambaDiff(**SMALL | fields)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return to_authors(network)


def saved(contents: Any, path: Path) -> Path:
    torch.save(contents, path)
    return path


def test_the_authors_checkpoint_gives_their_output(checkpoint: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(checkpoint, tmp_path / "out")
    golden = load_golden("authors-checkpoint")
    assert report.config == golden.config
    assert (report.weights, report.warnings, report.missing) == ("ema", (), ("vae",))
    assert report.written == ("model_index.json", "scheduler", "transformer")
    assert all("relative_position_index" in key or "attn_mask" in key for key in report.dropped)
    network = loaded(tmp_path / "out")
    assert report.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        sample = network(*golden.inputs).sample
    torch.testing.assert_close(sample, golden.tensors["out"], rtol=0, atol=MAX_ABS)


def test_the_other_weights_are_taken_if_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(checkpoint, tmp_path / "out", weights="model")
    assert report.weights == "model"
    expected = load_golden("authors-checkpoint").weights["final_linear.weight"] * 1.5
    assert torch.equal(loaded(tmp_path / "out").state_dict()["final_layer.linear.weight"], expected)


def test_there_and_back_is_bit_for_bit_and_needs_no_allowed_class(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back" / "back.pt")
    back = torch.load(tmp_path / "back" / "back.pt", weights_only=True)
    expected = load_golden("authors-checkpoint").weights
    for weights in (back["ema"], back["model"]):
        assert set(weights) == set(expected)
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
        assert all(weights[key].dtype == value.dtype for key, value in expected.items())
    report = convert_checkpoint(tmp_path / "back" / "back.pt", tmp_path / "again")
    assert (report.config, report.warnings) == (load_golden("authors-checkpoint").config, ())
    assert not list(tmp_path.glob("**/*.tmp"))


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "three-stages": {"depths": (2, 2, 2, 0)},
    "four-stages": {"depths": (2, 1, 1, 2), "bottleneck_depth": 2},
    "symmetric": {"decoder_extra_block": False},
    "no-middle": {"bottleneck_depth": 0},
    "patch": {"patch_size": 2, "sample_size": 16},
    "states-and-bias": {"d_state": 3, "conv_bias": True},
    "unconditional": {"num_classes": 0},
    "heads-and-window": {"num_heads": 4, "window_size": 2},
    "channels": {"in_channels": 16},
    "fixed-variance": {"learn_sigma": False},
}


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_architecture_is_read_off_a_bare_state_dict(fields: dict[str, Any], tmp_path: Path) -> None:
    weights = {f"module.{key}": value for key, value in authors_weights(**fields).items()}
    report = convert_checkpoint(saved(weights, tmp_path / "bare.pt"), tmp_path / "out")
    assert report.config == LaMambaConfig(**SMALL | fields)
    assert report.weights == "state dict"
    again = to_authors(loaded(tmp_path / "out"))
    assert all(torch.equal(value, weights[f"module.{key}"]) for key, value in again.items())


@pytest.mark.parametrize(
    ("stored", "option", "expected"),
    [
        (None, None, "ss2d_continuous"),
        (False, None, "ss2d"),
        (True, None, "ss2d_continuous"),
        (True, "ss2d", "ss2d"),
    ],
    ids=["unknown", "plain", "continuous", "option-wins"],
)
def test_the_scan_comes_from_the_option_or_the_config(
    stored: bool | None, option: Any, expected: str, tmp_path: Path
) -> None:
    contents: dict[str, Any] = {"ema": authors_weights()}
    if stored is not None:
        contents["config"] = {"MODEL": {"VSSM": {"CONTINUOUS_SCAN": stored}}}
    report = convert_checkpoint(saved(contents, tmp_path / "c.pt"), tmp_path / "out", vssm=option)
    assert report.config.vssm == expected
    assert bool(report.warnings) == (option is not None)


def test_a_window_wider_than_the_grid_comes_from_the_config() -> None:
    weights = authors_weights(window_size=8)
    stored = {"MODEL": {"VSSM": {"WINDOW_SIZE": 16}}}
    assert infer_config(weights)[0].window_size == 8
    assert infer_config(weights, stored_config=stored)[0].window_size == 16
    narrower = infer_config(authors_weights(window_size=4), stored_config=stored)
    assert narrower[0].window_size == 4
    assert "WINDOW_SIZE says 16; the network is built with 4" in narrower[1][0]


def test_weights_win_over_contradicting_args_and_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {
        "model": authors_weights(),
        "args": argparse.Namespace(num_heads=[4] * 4, image_size=256, num_classes=1000, window_size=7),
        "config": {"MODEL": {"VSSM": {"DEPTHS": [2, 2, 2, 2], "EMBED_DIM": 8}}},
    }
    report = convert_checkpoint(saved(contents, tmp_path / "c.pt"), tmp_path / "out")
    assert report.config == LaMambaConfig(**SMALL)
    assert [line.split(" says ")[0] for line in report.warnings] == [
        "config.MODEL.VSSM.DEPTHS",
        "args.num_heads",
        "args.image_size",
        "args.num_classes",
    ]
    assert len(caplog.records) == 4


def test_weights_without_attention_convert_if_said_so_and_run_in_the_authors_layout(tmp_path: Path) -> None:
    golden = load_golden("no-attention")
    path = saved(golden.weights, tmp_path / "bare.pt")
    report = convert_checkpoint(path, tmp_path / "out", attention="none")
    assert report.config == golden.config
    assert any("norm_swin" in key for key in report.dropped)
    # Back in their layout the attention has gates of zero: the same function.
    export_checkpoint(tmp_path / "out", tmp_path / "back.pt")
    assert convert_checkpoint(tmp_path / "back.pt", tmp_path / "with").config.attention == "shifted_window"
    for folder in ("out", "with"):
        with torch.no_grad():
            sample = loaded(tmp_path / folder)(*golden.inputs).sample
        torch.testing.assert_close(sample, golden.tensors["out"], rtol=0, atol=MAX_ABS)


@pytest.mark.parametrize("form", ["list", "object", "lines"])
def test_vae_and_labels_complete_a_folder_that_diffusers_loads(form: str, tmp_path: Path) -> None:
    texts = {
        "list": json.dumps(LABELS),
        "object": json.dumps({str(i): name for i, name in enumerate(LABELS)}),
        "lines": "\n".join(LABELS) + "\n",
    }
    (tmp_path / "labels").write_text(texts[form])
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    path = saved(authors_weights(), tmp_path / "bare.pt")
    report = convert_checkpoint(path, tmp_path / "out", vae=tmp_path / "vae", labels=tmp_path / "labels")
    assert report.missing == ()
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert pipeline.get_label_ids(["old hall"]) == [2]
    assert isinstance(pipeline.transformer, LaMambaDiff)


def test_converting_again_without_labels_keeps_those_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(json.dumps(LABELS))
    checkpoint = saved(authors_weights(), tmp_path / "a.pt")
    convert_checkpoint(checkpoint, tmp_path / "out", labels=tmp_path / "labels")
    convert_checkpoint(checkpoint, tmp_path / "out")
    assert read_model_index(tmp_path / "out").labels(len(LABELS)) == tuple(LABELS)


def test_converting_again_replaces_the_network_and_keeps_other_entries(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(saved(authors_weights(), tmp_path / "a.pt"), out)
    (out / "card.md").write_text("mine")
    convert_checkpoint(saved(authors_weights(d_state=2), tmp_path / "b.pt"), out, dtype=torch.bfloat16)
    assert loaded(out).architecture.d_state == 2
    assert (out / "card.md").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt", "b.pt", "out"]


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.pop(key)


def _with(key: str, value: Callable[[Tensor], Tensor], source: str | None = None) -> Callable[..., object]:
    return lambda weights: weights.update({key: value(weights[source or key])})


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (
        _without("layers.1.blocks.0.mlp.fc1.bias"),
        r"1 missing \(layers.1.blocks.0.mlp.fc1.bias\)",
    ),
    "unexpected": (_with("layers.0.extra", Tensor.clone, "pos_embed"), r"1 unexpected \(layers.0.extra\)"),
    "shape": (
        _with("layers.0.blocks.1.mlp.fc2.weight", lambda value: value[:, 1:]),
        r"1 of a wrong shape \(layers.0.blocks.1.mlp.fc2.weight \(8, 31\) for \(8, 32\)\)",
    ),
    "no-network": (_without("pos_embed"), r"not LaMamba-Diff weights: 1 missing \(pos_embed\)"),
    "not-finite": (_with("pos_embed", lambda value: value / 0), r"1 in \(pos_embed\)"),
    "integers": (_with("final_linear.bias", Tensor.long), r"1 in \(final_linear.bias\)"),
    "index": (
        _with("mid_layer.blocks.0.attn.relative_position_index", lambda value: value.T),
        "mid_layer.blocks.0.attn.relative_position_index: other values",
    ),
    "mask": (
        _with("layers.0.blocks.1.attn_mask", torch.zeros_like),
        "layers.0.blocks.1.attn_mask: other values",
    ),
    "mask-of-an-unshifted-block": (
        _with("layers.0.blocks.0.attn_mask", Tensor.clone, "layers.0.blocks.1.attn_mask"),
        r"1 unexpected \(layers.0.blocks.0.attn_mask\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_in_one_line(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    weights = authors_weights()
    change(weights)
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(saved(weights, tmp_path / "bare.pt"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "bare.pt") in str(caught.value)
    assert not (tmp_path / "out").exists()


class Payload:
    """What a hostile file holds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched-by-a-checkpoint"),))


def _damaged(path: Path, kind: str) -> Path:
    data = path.read_bytes()
    if kind == "flipped-bit":
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    elif kind == "empty":
        data = b""
    elif kind == "text":
        data = b"<html>not found</html>"
    else:
        data = data[: int(len(data) * float(kind))]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "flipped-bit", "0.001", "0.5", "0.999"])
def test_a_damaged_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = _damaged(saved({"ema": authors_weights()}, tmp_path / "c.pt"), kind)
    with pytest.raises(ValueError, match=r"c\.pt: damaged, or it holds more than weights") as caught:
        convert_checkpoint(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "bare-pickle"])
def test_code_in_a_file_does_not_run(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"ema": authors_weights(), "args": Payload()}
    if legacy:
        Path("c.pt").write_bytes(pickle.dumps(contents["args"], protocol=2))
    else:
        saved(contents, Path("c.pt"))
    with pytest.raises(ValueError, match="is refused as unsafe"):
        convert_checkpoint(Path("c.pt"), Path("out"))
    assert not Path("touched-by-a-checkpoint").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "holds a list; a dict is accepted"),
        ({}, "is not a state dict"),
        ({"ema": {"step": 3}}, r"its ema is not a state dict; 1 not tensors \(step\)"),
        ({"epoch": 3, "loss": 0.1}, r"its state dict is not a state dict; 2 not tensors \(epoch, loss\)"),
    ],
    ids=["list", "nothing", "numbers-in-ema", "numbers"],
)
def test_other_contents_are_refused(contents: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(saved(contents, tmp_path / "c.pt"), tmp_path / "out")


def test_wrong_companions_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = saved(authors_weights(), tmp_path / "bare.pt")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    (tmp_path / "names.json").write_text('{"one": 1, "two": 2}')
    (tmp_path / "keys.json").write_text('{"one": "1", "two": "2"}')
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=3).save_pretrained(
        tmp_path / "vae"
    )
    attempts: list[tuple[dict[str, Any], str]] = [
        ({"labels": tmp_path / "labels.txt"}, "labels: 2 given; the checkpoint has 5 classes"),
        ({"labels": tmp_path / "names.json"}, "labels: .*names.json has entries that are not names"),
        ({"labels": tmp_path / "keys.json"}, "labels: .*keys.json has other keys than 0, 1, ..."),
        ({"labels": tmp_path / "absent"}, "labels: .*absent cannot be read"),
        ({"vae": tmp_path / "vae"}, "vae: 3 latent channels given; the network has 4"),
        ({"vae": tmp_path / "absent"}, "autoencoder: .*absent given"),
        ({"weights": "ema"}, "weights: 'ema' given; .* has a bare state dict"),
    ]
    for options, message in attempts:
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(path, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="no such file"):
        convert_checkpoint(tmp_path / "absent.pt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"out_dir: .* which is a file"):
        convert_checkpoint(path, tmp_path / "labels.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vssm": "vim"}, "vssm: 'vim' given; the authors' code has ss2d_continuous or ss2d"),
        (
            {"attention": "window"},
            "attention: 'window' given; the authors' code has shifted_window or global",
        ),
        ({"skip": "concat"}, "skip: 'concat' given; the authors' code has add"),
        ({"qk_norm": True}, "qk_norm: True given; the authors' code has False"),
        (
            {"num_downsamplings": 1, "depths": (1, 1, 1)},
            "num_downsamplings: 1 given; the authors' code has 2",
        ),
        ({"layout": "isotropic", "depths": (1,), "bottleneck_depth": 0}, "layout: 'isotropic' given"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_networks_that_their_code_lacks_are_not_exported(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    LaMambaDiff(**SMALL | fields).save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "net", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_global_attention_exports_as_one_window() -> None:
    torch.manual_seed(0)
    network = LaMambaDiff(**SMALL | {"attention": "global"})
    config, _ = infer_config(to_authors(network))
    assert (config.attention, config.window_size) == ("shifted_window", 8)
    own, _ = from_authors(to_authors(network), config)
    same = LaMambaDiff(**dataclasses.asdict(config))
    same.load_state_dict(own)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = network.eval()(latents, torch.tensor([5])).sample
        assert torch.equal(same.eval()(latents, torch.tensor([5])).sample, expected)


def test_a_folder_with_missing_weights_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the network cannot be loaded"):
        export_checkpoint(tmp_path, tmp_path / "out.pt")
