"""If this fails, the average that is chosen after training is not of the length that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.training.averages import PowerAverage, gamma_of, snapshot_weights
from model.training.snapshots import average_of_length, write_snapshot

TRACKS = (0.05, 0.1)
# Relative to what training changed. The fit of 2 x 16 profiles is good to 1e-3, fp16 rounds to 5e-4.
TOLERANCE = 5e-3


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_gamma_of_inverts_the_profiles_deviation(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.3, -1.0])
def test_gamma_of_refuses_what_no_profile_has(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=rf"sigma_rel: {sigma_rel} given; above 0, up to 0.2887 is accepted"):
        gamma_of(sigma_rel)


def test_power_average_weights_a_step_by_its_power() -> None:
    """(gamma + 1) tau^gamma / t^(gamma + 1), of which a step takes the integral over its own length."""
    parameter, steps = torch.zeros(1), 50
    track = PowerAverage([parameter], 0.1)
    values = np.random.default_rng(0).standard_normal(steps)
    for step, value in enumerate(values, start=1):
        parameter.fill_(value)
        track.update(step, interval=1)
    edges = (np.arange(steps + 1) / steps) ** (track.gamma + 1)
    assert float(track.average[0]) == pytest.approx(float(np.diff(edges) @ values), rel=1e-5)


def test_updates_at_intervals_come_near_to_those_at_each_step() -> None:
    """They lag by half an interval: 4 of 800 steps, of a value that grows as their root."""
    parameter = torch.zeros(1)
    tracks = {interval: PowerAverage([parameter], 0.1) for interval in (1, 8)}
    for step in range(1, 801):
        parameter.fill_(step**0.5)
        for interval, track in tracks.items():
            if step % interval == 0:
                track.update(step, interval=interval)
    assert float(tracks[8].average[0]) == pytest.approx(float(tracks[1].average[0]), rel=4e-3)


def test_snapshot_weights_pick_a_snapshot_of_the_wanted_length() -> None:
    weights = snapshot_weights([(50, 0.05), (50, 0.1), (100, 0.05), (100, 0.1)], time=100, sigma_rel=0.1)
    assert weights == pytest.approx([0, 0, 0, 1], abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.12])
def test_average_of_length_is_the_average_computed_directly(tmp_path: Path, sigma_rel: float) -> None:
    """Of a random walk, whose averages differ by their lengths."""
    generator = torch.Generator().manual_seed(0)
    parameter, steps = torch.zeros(1000), 640
    tracks = [PowerAverage([parameter], sigma) for sigma in TRACKS]
    wanted = PowerAverage([parameter], sigma_rel)
    for step in range(1, steps + 1):
        parameter += 0.01 * torch.randn(1000, generator=generator)
        for track in (*tracks, wanted):
            track.update(step, interval=1)
        if step % 40 == 0:
            averages = {s: {"w": track.average[0]} for s, track in zip(TRACKS, tracks, strict=True)}
            write_snapshot(tmp_path, 256 * step, averages)
    average, images = average_of_length(tmp_path, sigma_rel)
    assert images == 256 * steps
    error = float((average["w"] - wanted.average[0]).norm() / parameter.norm())
    assert error < TOLERANCE
    other = float((tracks[0].average[0] - tracks[1].average[0]).norm() / parameter.norm())
    assert other > 10 * TOLERANCE  # the lengths matter


def test_average_of_length_says_which_snapshots_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sigma_rel: .* has no snapshot of 512 images; a run with ema_tracks"
    ):
        average_of_length(tmp_path, 0.1, images_seen=512)


def test_average_of_length_names_a_damaged_snapshot(tmp_path: Path) -> None:
    for images in (256, 512):
        write_snapshot(tmp_path, images, {0.1: {"w": torch.zeros(3)}})
    damaged = tmp_path / "averages-000000000256.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"sigma_rel: .*averages-000000000256\.safetensors cannot be read"):
        average_of_length(tmp_path, 0.1)
    damaged.unlink()
    assert average_of_length(tmp_path, 0.1)[1] == 512
