"""If this fails, a mistake in a recipe costs a training run, or a resumed run becomes another one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from model import default_model_dir
from model.training.config import TrainConfig

REQUIRED = {"name": "tiny", "output_dir": "runs/tiny", "resolution": 128}


def _config(**fields: Any) -> TrainConfig:
    return TrainConfig.from_dict(REQUIRED | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 given; an integer of at least 1 is accepted"),
        ({"batch_size": 2.5}, "batch_size: 2.5 given; an integer of at least 1 is accepted"),
        ({"num_images": "abc"}, "num_images: 'abc' given; an integer of at least 1 is accepted"),
        ({"seed": True}, "seed: True given; an integer of at least 0 is accepted"),
        ({"batch_size": 2**63}, f"batch_size: {2**63} given; at most {2**63 - 1} is accepted"),
        ({"seed": 2**63}, f"seed: {2**63} given; at most {2**63 - 1} is accepted"),
        ({"warmup_images": -1}, "warmup_images: -1 given; an integer of at least 0 is accepted"),
        (
            {"num_images": 8, "warmup_images": 8},
            "warmup_images: 8 given; less than num_images, 8, is accepted",
        ),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 given; a finite number above 0 is accepted"),
        ({"learning_rate": math.inf}, "learning_rate: inf given; a finite number above 0 is accepted"),
        ({"learning_rate": None}, "learning_rate: None given; a finite number above 0 is accepted"),
        ({"state_every_s": math.nan}, "state_every_s: nan given; a finite number above 0 is accepted"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: nan given; a number above 0, or inf, is accepted"),
        ({"stop_after_s": 0}, "stop_after_s: 0 given; a number above 0, or inf, is accepted"),
        ({"weight_decay": math.nan}, "weight_decay: nan given; a finite number of at least 0 is accepted"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 given; a number from 0 to below 1 is accepted"),
        ({"adam_betas": 0.9}, "adam_betas: 0.9 given; a pair of numbers from 0 to below 1 is accepted"),
        ({"adam_betas": [0.9, 1.0]}, r"adam_betas: \[0.9, 1.0\] given; a pair of numbers from 0 to below 1"),
        ({"adam_betas": [0.9]}, r"adam_betas: \[0.9\] given; a pair of numbers from 0 to below 1"),
        ({"learning_rate_schedule": "step"}, "one of constant, cosine is accepted"),
        ({"timestep_density": "beta"}, "one of uniform, logit_normal is accepted"),
        ({"min_snr_gamma": 0}, "min_snr_gamma: 0 given; a number above 0, or inf, is accepted"),
        ({"logit_normal": [0.0, 0.0]}, "given; a pair of numbers, the second above 0, is accepted"),
        ({"logit_normal": [math.nan, 1.0]}, r"logit_normal: \[nan, 1.0\] given; a pair of numbers"),
        ({"compile": False}, "compile: False given; one of none, block, full is accepted"),
        (
            {"compile": "full", "parallel": "fsdp"},
            "compile: 'full' given; with parallel=fsdp, none or block is accepted",
        ),
        ({"cuda_graph": 1}, "cuda_graph: 1 given; one of False, True is accepted"),
        ({"network": "XL"}, "network: 'XL' given; a mapping of the network's fields is accepted"),
        ({"autoencoder": ""}, "autoencoder: '' given; a text is accepted"),
        ({"name": 3}, "name: 3 given; a text is accepted"),
        ({"initial_weights": 3}, "initial_weights: 3 given; a model folder, or none, is accepted"),
        ({"epochs": 3}, "epochs: unknown field of a training run; it has name,"),
        ({"batchsize": 3}, r"batchsize: unknown field of a training run; did you mean batch_size"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_train_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**fields)


def test_train_config_accepts_infinity_where_it_means_no_limit() -> None:
    config = _config(max_grad_norm=math.inf, stop_after_s=math.inf, learning_rate=1, adam_betas=[0, 0.5])
    assert config.adam_betas == (0, 0.5)


def test_train_config_names_a_missing_field() -> None:
    with pytest.raises(ValueError, match="output_dir: missing"):
        TrainConfig.from_dict({"name": "x", "resolution": 128})


def test_autoencoder_source_is_the_shipped_one_or_what_was_given() -> None:
    assert Path(_config().autoencoder_source) == default_model_dir(256) / "vae"
    assert Path(_config(autoencoder="places").autoencoder_source) == default_model_dir(256) / "vae"
    assert _config(autoencoder="./places").autoencoder_source == "./places"


def test_changes_since_names_what_a_resumed_run_does_otherwise() -> None:
    earlier = json.loads(json.dumps(_config(network={"depths": (1, 1, 1, 0)}).to_dict()))
    same = _config(network={"depths": [1, 1, 1, 0]})
    assert same.changes_since(earlier) == {}
    other = _config(network={"depths": [1, 1, 1, 0]}, weight_decay=0.1, adam_betas=(0.9, 0.99))
    assert other.changes_since(earlier) == {
        "weight_decay": (0.0, 0.1),
        "adam_betas": ([0.9, 0.999], [0.9, 0.99]),
    }


@pytest.mark.parametrize(
    "fields",
    [{"batch_size": 4}, {"resolution": 256}, {"seed": 1}, {"num_views": 9}, {"ema_tracks": [0.1]}],
    ids=lambda fields: next(iter(fields)),
)
def test_changes_since_refuses_another_run(fields: dict[str, Any]) -> None:
    message = f"{next(iter(fields))}: .* given; the run in runs/tiny was started with"
    with pytest.raises(ValueError, match=message):
        _config(**fields).changes_since(_config().to_dict())


def test_network_config_follows_from_data_and_autoencoder() -> None:
    sizes = {"num_classes": 21, "downsampling": 8, "in_channels": 4}
    stated = {"num_classes": 21, "in_channels": 4, "sample_size": 16}
    assert _config(network=stated).network_config(**sizes) == _config().network_config(**sizes)
    assert _config(network={"num_classes": 0}).network_config(**sizes).num_classes == 0


@pytest.mark.parametrize(
    ("field", "given", "accepted"),
    [
        ("num_classes", 20, "21 or 0"),
        ("num_classes", 1000, "21 or 0"),
        ("num_classes", None, "21 or 0"),
        ("in_channels", 3, "4"),
        ("sample_size", 32, "16"),
    ],
)
def test_network_config_refuses_what_contradicts_the_data(field: str, given: Any, accepted: str) -> None:
    config = _config(network={field: given})
    with pytest.raises(ValueError, match=rf"network\.{field}: {given} given; {accepted}, which follows from"):
        config.network_config(num_classes=21, downsampling=8, in_channels=4)
