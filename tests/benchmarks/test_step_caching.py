"""benchmarks/step_caching.py: if this fails, what a step cache saves and costs is not what is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.step_caching import (
    BATCH,
    Setting,
    distance_fields,
    forward_macs,
    image_macs,
    nearness,
    psnr_cost,
    sampled,
    step_cache,
)
from model.network.lamamba import LaMambaDiff
from model.pipeline import LaMambaPipeline
from tests.tiny_model import save_tiny_model


@pytest.fixture
def network() -> LaMambaDiff:
    torch.manual_seed(0)
    network = LaMambaDiff(sample_size=8, hidden_size=8, num_heads=2, num_classes=3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.requires_grad_(False)


def caching(interval: int, depth: int, steps: int = 9, start: int = 0) -> Setting:
    return Setting(sampler="ddim", steps=steps, interval=interval, depth=depth, start=start)


def output(network: LaMambaDiff, seed: int, rows: slice = slice(None)) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    t, y = torch.tensor([900.0, 300.0]) - 10 * seed, torch.tensor([0, 2])
    sample: Tensor = network(x[rows], t[rows], y[rows]).sample
    return sample


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_step_cache_changes_only_the_calls_between_and_these_only_by_what_is_old(
    network: LaMambaDiff, depth: int
) -> None:
    plain = [output(network, seed) for seed in range(3)]
    with step_cache(network, caching(2, depth)) as cache:
        assert torch.equal(output(network, 0), plain[0])
        assert torch.equal(output(network, 0), plain[0])  # of the same inputs nothing is old
        assert torch.equal(output(network, 1), plain[1])
        assert not torch.allclose(output(network, 2), plain[2])
        cache.restart()
        assert torch.equal(output(network, 2), plain[2])
        cache.restart()
        assert torch.equal(output(network, 0), plain[0])
    assert torch.equal(output(network, 1), plain[1])


def test_step_cache_runs_no_deep_level_between(network: LaMambaDiff) -> None:
    def spoil(*modules: torch.nn.Module) -> None:
        for module in modules:
            for parameter in module.parameters():
                parameter.fill_(torch.nan)

    with step_cache(network, caching(3, 1)):
        output(network, 0)
        before = output(network, 1)
        spoil(*network.encoder[1:], *network.mergings, network.middle, *network.decoder[:-1])
        spoil(*network.expandings)
        assert torch.equal(output(network, 1), before)


def test_step_cache_keeps_rows_apart(network: LaMambaDiff) -> None:
    together, alone = [], []
    for rows, outputs in ((slice(None), together), (slice(0, 1), alone), (slice(1, 2), alone)):
        with step_cache(network, caching(2, 1)):
            output(network, 0, rows)
            outputs.append(output(network, 1, rows))
    torch.testing.assert_close(together[0], torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 4])
def test_step_cache_names_a_depth_that_skips_nothing(network: LaMambaDiff, depth: int) -> None:
    with (
        pytest.raises(ValueError, match=f"depth: {depth} given; this network accepts 1 to 3"),
        step_cache(network, caching(2, depth)),
    ):
        pass


def test_image_macs_are_of_two_rows_of_whole_and_of_outer_steps(network: LaMambaDiff) -> None:
    macs = [forward_macs(network.architecture, depth) for depth in range(3)]
    assert 0 < macs[1] < macs[2] < macs[0]
    plain = Setting(sampler="dpm++", steps=5)
    assert image_macs(plain, network.architecture) == 2 * 5 * macs[0]
    for cached, whole in ((caching(2, 1, steps=5), 3), (caching(2, 2, steps=5, start=3), 4)):
        expected = 2 * (whole * macs[0] + (5 - whole) * macs[cached.depth])
        assert image_macs(cached, network.architecture) == expected


def test_sampled_begins_each_batch_with_a_whole_step(tmp_path: Path) -> None:
    pipeline = LaMambaPipeline.load(save_tiny_model(tmp_path), device="cpu")
    one_whole_step = caching(2, 1, steps=1)
    images = BATCH + 2  # a cache that counted on would skip the only step of the last two
    plain = sampled(pipeline, Setting(sampler="ddim", steps=1), images)
    assert torch.equal(sampled(pipeline, one_whole_step, images), plain)
    plain = sampled(pipeline, Setting(sampler="ddim", steps=2), images)
    assert not torch.equal(sampled(pipeline, caching(2, 1, steps=2), images), plain)


def test_psnr_cost_is_beside_the_plain_steps_of_that_psnr() -> None:
    def row(interval: int, psnr_db: float, gmacs: float) -> dict[str, float | str]:
        return {"sampler": "dpm++", "interval": interval, "psnr_db": psnr_db, "gmacs": gmacs}

    rows = [row(1, 30, 2), row(1, 20, 1), row(2, 25, 1.2), row(2, 31, 1), row(1, 19, 0.5)]
    assert [psnr_cost(each, rows) for each in rows] == [1, 1, 0.8, None, 1]


def test_distance_fields_cancel_what_both_settings_share() -> None:
    shared = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fields = distance_fields(100 + shared, 90 + shared)
    assert fields["frechet_difference"] == 10
    assert fields["frechet_difference_error"] == 0


def test_nearness_is_of_the_first_images_alone() -> None:
    pixels = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    features = torch.zeros(2, 5)
    reference = pixels[:1] + 10, features[:1] + 2
    expected = {"psnr_db": pytest.approx(28.13), "feature_distance": 20}
    assert nearness((pixels, features), reference, 1) == expected
