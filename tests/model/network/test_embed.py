"""If this fails, the network is told another timestep, class or place than it was trained with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.network.embed import (
    LabelEmbedding,
    PatchEmbed,
    check_labels,
    position_table,
    resized_position_table,
    sinusoid,
    timestep_rows,
)


def test_sinusoid_has_cosines_then_sines_of_unscaled_time() -> None:
    timestep = torch.tensor([0.0, 1.0, 12.5, 999.0])
    expected = torch.tensor(
        [
            [
                function(t * math.exp(-math.log(10_000) * i / 128))
                for function in (math.cos, math.sin)
                for i in range(128)
            ]
            for t in timestep.tolist()
        ]
    )
    # One ulp of a frequency moves the angle at t = 999 by 6e-5.
    torch.testing.assert_close(sinusoid(timestep), expected, rtol=0, atol=1e-4)


def test_sinusoid_is_fp32_for_integers_and_halves() -> None:
    for dtype in (torch.int64, torch.bfloat16, torch.float16):
        given = sinusoid(torch.tensor([3], dtype=dtype))
        assert given.dtype == torch.float32
        assert torch.equal(given, sinusoid(torch.tensor([3.0])))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patch_embed_is_a_strided_convolution_and_a_norm(patch_size: int) -> None:
    torch.manual_seed(0)
    module = PatchEmbed(3, 8, patch_size=patch_size)
    latents = torch.randn(2, 3, 8, 4)
    kernel = module.proj.weight.view(8, 3, patch_size, patch_size)
    tokens = F.conv2d(latents, kernel, module.proj.bias, stride=patch_size).movedim(1, -1)
    torch.testing.assert_close(module(latents), module.norm(tokens), rtol=0, atol=1e-5)


def test_position_table_has_the_column_first() -> None:
    table = position_table(5, 8)[0]
    for row, column, j in [(0, 0, 0), (3, 1, 0), (1, 4, 1), (4, 2, 1)]:
        frequency = 10_000 ** (-j / 2)
        expected = [math.sin(column * frequency), math.cos(column * frequency)]
        expected += [math.sin(row * frequency), math.cos(row * frequency)]
        given = table[row, column, [j, 2 + j, 4 + j, 6 + j]]
        torch.testing.assert_close(given, torch.tensor(expected), rtol=0, atol=1e-6)


def test_resized_position_table_keeps_the_trained_size_and_interpolates_others() -> None:
    table = torch.randn(1, 4, 4, 8)
    assert resized_position_table(table, 4, 4) is table
    assert resized_position_table(table, 8, 6).shape == (1, 8, 6, 8)
    constant = torch.ones(1, 4, 4, 8)
    torch.testing.assert_close(resized_position_table(constant, 7, 3), torch.ones(1, 7, 3, 8))


@pytest.mark.parametrize("num_classes", [0, 5, 1000, 1500])
def test_label_embedding_finds_the_null_row_in_both_spellings(num_classes: int) -> None:
    module = LabelEmbedding(num_classes, 4)
    null = module.embedding.weight[num_classes]
    assert torch.equal(module(torch.tensor([num_classes]))[0], null)
    if num_classes <= 1000:  # with more, 1000 is a class
        assert torch.equal(module(torch.tensor([1000]))[0], null)
    else:
        assert torch.equal(module(torch.tensor([1000]))[0], module.embedding.weight[1000])


@pytest.mark.parametrize("label", [-1, 6, 999])
def test_check_labels_names_the_label_and_the_range(label: int) -> None:
    check_labels(torch.tensor([0, 4, 5, 1000]), 5)
    with pytest.raises(
        ValueError, match=f"class_labels: {label} given; this network accepts 0 to 4, and 5 or"
    ):
        check_labels(torch.tensor([0, label]), 5)


def test_check_labels_lets_an_unconditional_network_ignore_them() -> None:
    check_labels(torch.tensor([-3, 12]), 0)


@pytest.mark.parametrize(
    "timestep", [5, 5.0, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 5, 5])], ids=repr
)
def test_timestep_rows_takes_what_diffusers_callers_give(timestep: torch.Tensor | float) -> None:
    assert timestep_rows(timestep, 3, torch.device("cpu")).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (torch.zeros(2), r"timestep: shape \(2,\) given; a scalar or \(3,\) is accepted"),
        (torch.zeros(3, 1), r"timestep: shape \(3, 1\) given"),
        ("5", "timestep: a str given; a number or a tensor is accepted"),
    ],
    ids=["length", "axes", "text"],
)
def test_timestep_rows_refuses_with_what_is_accepted(timestep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timestep_rows(timestep, 3, torch.device("cpu"))


def test_with_more_than_1000_classes_label_1000_is_a_class_and_not_named_as_null() -> None:
    check_labels(torch.tensor([1000, 2000]), 2000)
    with pytest.raises(ValueError, match="2001 given; this network accepts 0 to 1999, and 2000 for the null"):
        check_labels(torch.tensor([2001]), 2000)
