"""If this fails, FD-DINOv2 is measured on other features than the published network's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model.evaluation import features
from model.evaluation.features import DinoV2
from model.evaluation.vision_transformer import HEAD_DIM, load_dinov2

WIDTH, DEPTH, GRID, PATCH = 128, 2, 5, 4
MLP = {False: 512, True: 344}  # inputs of the second layer, by whether the MLP is gated
TOLERANCE = 1e-4  # absolute, fp32 against float64, on features around 1; measured 3e-6

Weights = dict[str, torch.Tensor]


def _timm_weights(gated: bool) -> Weights:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    mlp = MLP[gated]
    weights = {
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, 1 + GRID**2, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": random(WIDTH),
        "norm.weight": 1 + random(WIDTH),
        "norm.bias": random(WIDTH),
    }
    shapes = {
        "norm1.weight": (WIDTH,),
        "norm1.bias": (WIDTH,),
        "attn.qkv.weight": (3 * WIDTH, WIDTH),
        "attn.qkv.bias": (3 * WIDTH,),
        "attn.proj.weight": (WIDTH, WIDTH),
        "attn.proj.bias": (WIDTH,),
        "ls1.gamma": (WIDTH,),
        "norm2.weight": (WIDTH,),
        "norm2.bias": (WIDTH,),
        "mlp.fc1.weight": (2 * mlp if gated else mlp, WIDTH),
        "mlp.fc1.bias": (2 * mlp if gated else mlp,),
        "mlp.fc2.weight": (WIDTH, mlp),
        "mlp.fc2.bias": (WIDTH,),
        "ls2.gamma": (WIDTH,),
    }
    for block in range(DEPTH):
        for name, shape in shapes.items():
            weights[f"blocks.{block}.{name}"] = 3 * random(*shape)
    return weights


def _as_transformers(weights: Weights, gated: bool) -> Weights:
    """The same weights as Dinov2Model saves them."""
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "mlp.weights_in" if gated else "mlp.fc1",
        "mlp.fc2": "mlp.weights_out" if gated else "mlp.fc2",
    }
    renamed = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.mask_token": torch.zeros(1, WIDTH),
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    for name, value in weights.items():
        if not name.startswith("blocks."):
            continue
        _, block, rest = name.split(".", 2)
        layer = f"encoder.layer.{block}"
        if rest.startswith("attn.qkv."):
            for kind, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{kind}.{rest.rpartition('.')[2]}"] = part.contiguous()
        else:
            old = next(old for old in names if rest.startswith(old))
            renamed[f"{layer}.{names[old]}{rest.removeprefix(old)}"] = value
    return renamed


def _save(folder: Path, weights: Weights, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _oracle(weights: Weights, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The class token, one head at a time, in float64."""
    w = {name: value.double() for name, value in weights.items()}
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], PATCH)
    tokens = [w["cls_token"][0].expand(len(images), 1, WIDTH), x.flatten(2).mT]
    x = torch.cat(tokens, dim=1) + positions.double()
    for block in range(DEPTH):
        b = {name.split(".", 2)[2]: v for name, v in w.items() if name.startswith(f"blocks.{block}.")}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = (y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, dim=-1)
        heads = []
        for start in range(0, WIDTH, HEAD_DIM):
            head = slice(start, start + HEAD_DIM)
            weight = (q[..., head] @ k[..., head].mT / math.sqrt(HEAD_DIM)).softmax(dim=-1)
            heads.append(weight @ v[..., head])
        y = torch.cat(heads, dim=-1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + b["ls1.gamma"] * y
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        width = b["mlp.fc2.weight"].shape[1]
        gated = y.shape[-1] == 2 * width
        y = F.silu(y[..., :width]) * y[..., width:] if gated else y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + b["ls2.gamma"] * (y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    return F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 0]


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_both_layouts_give_the_class_token(gated: bool, tmp_path: Path) -> None:
    weights = _timm_weights(gated)
    timm = load_dinov2(_save(tmp_path / "timm", weights, {"architecture": "vit_small_patch14_dinov2"}))
    config = {"model_type": "dinov2", "hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD_DIM}
    transformers = load_dinov2(_save(tmp_path / "hf", _as_transformers(weights, gated), config))
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    expected = _oracle(weights, images, weights["pos_embed"])
    with torch.inference_mode():
        torch.testing.assert_close(timm(images).double(), expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(transformers(images), timm(images))


def test_positions_are_resized_as_in_dinov2s_code(tmp_path: Path) -> None:
    """Bicubic by (side + 0.1) / grid: output j reads at (j + 0.5) / factor - 0.5, weights of a = -0.75."""
    weights = _timm_weights(False)
    network = load_dinov2(_save(tmp_path / "timm", weights, {"architecture": "vit_small_patch14_dinov2"}))
    side = 3
    factor = (side + 0.1) / GRID
    matrix = torch.zeros(side, GRID, dtype=torch.float64)
    for j in range(side):
        place = (j + 0.5) / factor - 0.5
        for i in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - i)
            near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[j, min(max(i, 0), GRID - 1)] += near if t <= 1 else far
    grid = weights["pos_embed"][0, 1:].double().unflatten(0, (GRID, GRID))
    resized = torch.einsum("yi,xj,ijd->yxd", matrix, matrix, grid).flatten(0, 1)
    positions = torch.cat([weights["pos_embed"][0, :1].double(), resized])
    images = torch.randn(2, 3, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = network(images).double()
    torch.testing.assert_close(found, _oracle(weights, images, positions), atol=TOLERANCE, rtol=0)


def test_the_extractor_resizes_and_normalises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bicubic with antialias, clamped to 8 bits' range, ImageNet's mean and deviation."""
    monkeypatch.setattr(features, "_DINOV2_SIZE", GRID * PATCH)
    weights = _timm_weights(False)
    extractor = DinoV2(_save(tmp_path / "timm", weights, {"architecture": "vit_small_patch14_dinov2"}))
    assert (extractor.name, extractor.num_features) == (f"DINOv2 width {WIDTH}/{PATCH}", WIDTH)
    pixels = torch.randint(0, 256, (2, 50, 50, 3), dtype=torch.uint8)
    x = F.interpolate(pixels.movedim(-1, 1).double(), (20, 20), mode="bicubic", antialias=True).clamp(0, 255)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    expected = _oracle(weights, (x / 255 - mean) / deviation, weights["pos_embed"])
    torch.testing.assert_close(extractor(pixels).pooled.double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "config.json is of 'vit'"),
        ({"model_type": "dinov2_with_registers"}, "without registers is accepted.*'dinov2_with_registers'"),
        (
            {"model_type": "dinov2", "hidden_size": 128, "num_attention_heads": 8},
            "num_attention_heads 8 for hidden_size 128",
        ),
    ],
)
def test_other_networks_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"extractor: .*{message}"):
        load_dinov2(_save(tmp_path / "folder", {"norm.weight": torch.ones(4)}, config))


def test_missing_files_and_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extractor: .*nowhere given; a DINOv2 folder .*config\.json"):
        load_dinov2(tmp_path / "nowhere")
    weights = _timm_weights(False)
    del weights["blocks.1.ls2.gamma"]
    with pytest.raises(ValueError, match=r"blocks\.1\.ls2\.gamma"):
        load_dinov2(_save(tmp_path / "folder", weights, {"architecture": "vit_small_patch14_dinov2"}))
