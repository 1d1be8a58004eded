"""If this fails, what is called FID, sFID or Inception Score is of another network than everyone else's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.evaluation import features
from model.evaluation.features import InceptionV3
from model.evaluation.inception import Inception, InceptionOutputs, load_inception, tf1_bilinear

TOLERANCE = 1e-5  # absolute, fp32, on features around 0.4; measured 2e-6: the order of sums

# What the 2015-12-05 graph computes, written out once more: /s behind a name for stride 2, /v for no padding
# at stride 1. Names and order of concatenation are torch-fidelity's.
STEM_1 = ["Conv2d_1a_3x3/s", "Conv2d_2a_3x3/v", "Conv2d_2b_3x3"]
STEM_2 = ["Conv2d_3b_1x1", "Conv2d_4a_3x3/v"]
FIRST = [
    ["branch1x1"],
    ["branch5x5_1", "branch5x5_2"],
    ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
]
MIDDLE = [
    ["branch1x1"],
    ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
    ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"],
]
LAST = [
    ["branch1x1"],
    ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
    ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
]
DOWN_6A = [["branch3x3/s"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/s"]]
DOWN_7A = [
    ["branch3x3_1", "branch3x3_2/s"],
    ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4/s"],
]
BLOCKS = {  # name: branches, how the pooled branch is made, output shape
    "Mixed_5b": (FIRST, "mean", (256, 35, 35)),
    "Mixed_5c": (FIRST, "mean", (288, 35, 35)),
    "Mixed_5d": (FIRST, "mean", (288, 35, 35)),
    "Mixed_6a": (DOWN_6A, "half", (768, 17, 17)),
    "Mixed_6b": (MIDDLE, "mean", (768, 17, 17)),
    "Mixed_6c": (MIDDLE, "mean", (768, 17, 17)),
    "Mixed_6d": (MIDDLE, "mean", (768, 17, 17)),
    "Mixed_6e": (MIDDLE, "mean", (768, 17, 17)),
    "Mixed_7a": (DOWN_7A, "half", (1280, 8, 8)),
    "Mixed_7b": (LAST, "mean", (2048, 8, 8)),
    "Mixed_7c": (LAST, "max", (2048, 8, 8)),
}
STEM_SHAPES = {
    "Conv2d_1a_3x3": (32, 149, 149),
    "Conv2d_2a_3x3": (32, 147, 147),
    "Conv2d_2b_3x3": (64, 147, 147),
    "Conv2d_3b_1x1": (80, 73, 73),
    "Conv2d_4a_3x3": (192, 71, 71),
}

Weights = dict[str, torch.Tensor]


def _unit(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Convolution, batch norm written out, ReLU."""
    name, _, how = name.partition("/")
    kernel = weights[f"{name}.conv.weight"]
    padding = (0, 0) if how else (kernel.shape[2] // 2, kernel.shape[3] // 2)
    x = F.conv2d(x, kernel, stride=2 if how == "s" else 1, padding=padding)
    mean, var, gain, bias = (
        weights[f"{name}.bn.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 0.001).sqrt() * gain + bias).clamp_min(0)


def _mean_pool(x: torch.Tensor) -> torch.Tensor:
    """3 x 3 means over the pixels that there are."""
    ones = torch.ones_like(x[:1, :1])
    return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)  # both with zeros around


def _block(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    branches, pool, _ = BLOCKS[name]
    outputs = []
    for branch in branches:
        y = x
        for step in branch:
            forks = step if isinstance(step, tuple) else (step,)
            y = torch.cat([_unit(weights, f"{name}.{fork}", y) for fork in forks], dim=1)
        outputs.append(y)
    if pool == "half":
        pooled = F.max_pool2d(x, 3, 2)
    else:
        pooled = _mean_pool(x) if pool == "mean" else F.max_pool2d(x, 3, 1, 1)
        pooled = _unit(weights, f"{name}.branch_pool", pooled)
    return torch.cat([*outputs, pooled], dim=1)


def _oracle(weights: Weights, x: torch.Tensor) -> InceptionOutputs:
    """`x`: (n, 3, 299, 299) in [0, 255]."""
    x = (x - 128) / 128
    for name in STEM_1:
        x = _unit(weights, name, x)
    x = F.max_pool2d(x, 3, 2)
    for name in STEM_2:
        x = _unit(weights, name, x)
    x = F.max_pool2d(x, 3, 2)
    for name in BLOCKS:
        if name == "Mixed_6d":
            maps = _unit(weights, "Mixed_6d.branch1x1", x)  # mixed_6/conv
            spatial = torch.stack([maps[:, :7, h, w] for h in range(17) for w in range(17)], dim=1).flatten(1)
        x = _block(weights, name, x)
    pooled = x.flatten(2).sum(dim=2) / 64
    exponentials = (pooled @ weights["fc.weight"].T).exp()
    return InceptionOutputs(
        pooled=pooled, spatial=spatial, probabilities=exponentials / exponentials.sum(dim=1, keepdim=True)
    )


@pytest.fixture(scope="module")
def network() -> Inception:
    """Random weights that keep the scale of what passes through."""
    torch.manual_seed(0)
    network = Inception().eval().requires_grad_(False)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.2)
        elif name.endswith("bn.weight"):
            value.uniform_(0.8, 1.6)
    return network


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(0)).float()


def test_network_equals_an_independent_one(network: Inception, pixels: torch.Tensor) -> None:
    """Outputs, and every block's shape on the way."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, y, name=name: shapes.update({name: tuple(y.shape[1:])}))
        for name, module in network.named_children()
        if name != "fc"
    ]
    with torch.inference_mode():
        found, expected = network(pixels), _oracle(network.state_dict(), pixels)
    for hook in hooks:
        hook.remove()
    assert shapes == STEM_SHAPES | {name: shape for name, (_, _, shape) in BLOCKS.items()}
    assert expected.pooled.shape == (1, 2048)
    assert expected.spatial.shape == (1, 2023)
    assert expected.probabilities.shape == (1, 1008)
    for field in ("pooled", "spatial", "probabilities"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=TOLERANCE, rtol=0)
    assert found.pooled.std() > 1000 * TOLERANCE


def test_parameters_are_as_many_as_published(network: Inception) -> None:
    """Keras documents 21,768,352 trainable and 34,432 other parameters of InceptionV3 without its classifier.

    Its batch norms have no gain, and its two other parameters a channel are the mean and the variance.
    """
    body = {name: p for name, p in network.named_parameters() if not name.startswith("fc.")}
    gains = sum(p.numel() for name, p in body.items() if name.endswith("bn.weight"))
    assert sum(p.numel() for p in body.values()) - gains == 21_768_352
    assert 2 * gains == 34_432
    assert network.fc.weight.shape == (1008, 2048)


def test_state_dict_has_the_names_of_torch_fidelitys_file(network: Inception) -> None:
    units = [name.partition("/")[0] for name in STEM_1 + STEM_2]
    for block, (branches, pool, _) in BLOCKS.items():
        names = [
            n
            for branch in branches
            for step in branch
            for n in (step if isinstance(step, tuple) else (step,))
        ]
        names += [] if pool == "half" else ["branch_pool"]
        units += [f"{block}.{name.partition('/')[0]}" for name in names]
    parts = (
        "conv.weight",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    )
    expected = {f"{unit}.{part}" for unit in units for part in parts} | {"fc.weight", "fc.bias"}
    assert len(units) == 94
    assert set(network.state_dict()) == expected


@pytest.mark.parametrize("shape", [(5, 7), (256, 256), (299, 299), (512, 300)])
def test_tf1_bilinear_equals_a_loop(shape: tuple[int, int]) -> None:
    """Corner-anchored: output i reads between pixels floor(i H / 299) and the next, the last one repeated."""
    image = torch.rand(1, 1, *shape, dtype=torch.float64) * 255
    found = tf1_bilinear(image, 299)
    assert found.shape == (1, 1, 299, 299)
    height, width = shape
    for i in range(0, 299, 23):
        for j in range(0, 299, 23):
            y, x = i * height / 299, j * width / 299
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b, c, d = (image[0, 0, r, s].item() for r in (top, bottom) for s in (left, right))
            upper, lower = a + (b - a) * (x - left), c + (d - c) * (x - left)
            assert found[0, 0, i, j].item() == pytest.approx(upper + (lower - upper) * (y - top), abs=1e-9)


def test_the_extractor_reads_its_file_alone(
    network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives ADM's features of 8-bit pixels of any size."""
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"extractor: .* has the SHA-256 .*; that of .* 6726825d"):
        InceptionV3(path)
    monkeypatch.setattr(features, "_INCEPTION_HASH", features.file_hash(path))
    extractor = InceptionV3(path)
    pixels = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
    found = extractor(pixels)
    with torch.inference_mode():
        expected = network(pixels.movedim(-1, 1).float())
    for field in ("pooled", "spatial", "probabilities"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=TOLERANCE, rtol=0)


def test_load_inception_names_what_is_wrong_with_a_file(network: Inception, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    accepted = r"; torch-fidelity's weights-inception-2015-12-05-6726825d\.pth is accepted"
    with pytest.raises(ValueError, match=rf"extractor: .*weights\.pth is missing{accepted}"):
        load_inception(path)
    path.write_bytes(b"no weights")
    with pytest.raises(
        ValueError, match=rf"extractor: .*weights\.pth cannot be read \(no weights .*\){accepted}"
    ):
        load_inception(path)
    # Expanded scalars: files of a few kilobytes.
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in network.state_dict().items()}
    without = {name: value for name, value in weights.items() if name != "fc.weight"}
    other = {**weights, "fc.weight": torch.zeros(1000, 2048)}
    for content, message in (
        (without, "has no fc.weight"),
        ({**weights, "AuxLogits.fc.bias": torch.zeros(1)}, "has AuxLogits.fc.bias too"),
        (other, "has fc.weight of shape 1000x2048"),
        ([1, 2], "has no Conv2d_1a_3x3.bn.bias"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_inception(path)
