"""benchmarks/image_agreement.py: if this fails, images that differ could pass for the same."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.image_agreement import EQUAL_DB, against_goals, compare_forward, decoded, generated, psnr
from tests.fakes import LABELS, fake_pipeline


def test_psnr_is_of_each_image_and_bounded_for_equal_ones() -> None:
    expected = torch.full((3, 4, 4, 3), 100, dtype=torch.uint8)
    pixels = expected.clone()
    pixels[1] += 10
    pixels[2, 0, 0, 0] = 0  # a difference that would wrap around in uint8
    assert psnr(expected, pixels) == pytest.approx(
        [EQUAL_DB, 20 * math.log10(25.5), 10 * math.log10(255**2 * 48 / 100**2)]
    )


def test_images_are_the_pipelines_and_their_latents_decode_to_them() -> None:
    pipeline = fake_pipeline()
    pixels, latents = generated(pipeline, 1.5, 18, 2)
    labels = [seed % len(LABELS) for seed in range(18)]
    alone = pipeline.generate(labels, seeds=range(18), guidance_scale=1.5, num_inference_steps=2)
    assert torch.equal(pixels, alone)
    assert torch.equal(decoded(pipeline, latents), pixels)


def test_a_forward_in_bf16_is_near_that_in_fp32_and_nearer_that_of_its_own_weights() -> None:
    row = compare_forward("tiny", torch.device("cpu"))
    assert 1e-4 < row["same_weights"] < row["relative_rms"] < 3e-2


def test_a_goal_counts_the_worst_image() -> None:
    decibels = [{part: {"min": least} for part in ("served", "network")} for least in (45.0, 39.0)]
    forward = {"preset": "XL", "relative_rms": 5e-3}
    goals = against_goals([{"psnr_db": values} for values in decibels], forward)
    assert goals["least_psnr_served_db"] == {"goal": ">= 40", "measured": 39.0, "met": False}
    assert goals["xl_forward_relative_rms"]["met"]
