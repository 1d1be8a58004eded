"""If these fail, the model card's figures are wrong, or normalising the latents changes the pictures."""

from __future__ import annotations

import pytest
import torch

from model.autoencoder import Autoencoder
from model.autoencoder_training.config import AutoencoderTrainingConfig, build_autoencoder
from model.autoencoder_training.measures import (
    gradient_energy,
    latent_statistics,
    normalise_latents,
    peak_signal_to_noise,
    point_response,
    reconstruction_metrics,
    reconstruction_picture,
)
from model.data.places import RESERVED_VIEW_IDS, Places

CONFIG = AutoencoderTrainingConfig(
    block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sizes=(16, 32), crop=16, batch_size=4
)


@pytest.fixture(scope="module")
def places() -> Places:
    return Places.load()


def test_peak_signal_to_noise_of_known_errors() -> None:
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = torch.stack((torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)))
    torch.testing.assert_close(peak_signal_to_noise(images, reconstructions), torch.tensor([20.0, 40.0]))


def test_gradient_energy_counts_each_pair_of_neighbours_once() -> None:
    images = torch.zeros(1, 1, 3, 3)
    images[0, 0, 1, 1] = 2
    assert gradient_energy(images).tolist() == [16.0]


def test_normalise_latents_gives_unit_latents_and_equal_images(places: Places) -> None:
    module = build_autoencoder(CONFIG)
    torch.nn.init.normal_(module.quant_conv.bias, std=0.5)
    autoencoder = Autoencoder(module)
    images, _ = places.render(torch.arange(3), 32)
    moments = autoencoder.encode_moments(images)
    before = autoencoder.decode(autoencoder.latents(moments, torch.ones(3, 4, 4, 4)))

    raw = latent_statistics(autoencoder, places, sizes=(16, 32), num_views=20)
    normalise_latents(module, mean=raw["mean"], std=raw["std"])
    statistics = latent_statistics(autoencoder, places, sizes=(16, 32), num_views=20)
    assert statistics["mean"] == pytest.approx([0] * 4, abs=1e-4)
    assert statistics["std"] == pytest.approx([1] * 4, rel=1e-4)
    after = autoencoder.decode(
        autoencoder.latents(autoencoder.encode_moments(images), torch.ones(3, 4, 4, 4))
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_latent_statistics_find_an_outlier(places: Places) -> None:
    class Spiked(Autoencoder):
        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            moments = torch.randn(images.shape[0], 8, 16, 16, generator=generator)
            moments[:, 4:] = -2.0
            moments[0, 1, 0, 0] = 50.0
            return moments

    statistics = latent_statistics(Spiked(build_autoencoder(CONFIG)), places, sizes=(16,), num_views=16)
    (by_size,) = statistics["by_size"].values()
    assert by_size["max_sigmas"][1] > 30
    assert max(by_size["max_sigmas"][c] for c in (0, 2, 3)) < 5
    assert by_size["kurtosis"][0] == pytest.approx(3, abs=0.4)
    assert by_size["kurtosis"][1] > 10
    assert by_size["posterior_std"] == pytest.approx([torch.exp(torch.tensor(-1.0)).item()] * 4, rel=1e-4)


def test_reconstruction_metrics_of_a_perfect_autoencoder(places: Places) -> None:
    class Perfect(Autoencoder):
        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def latents(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            return moments

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    metrics = reconstruction_metrics(Perfect(build_autoencoder(CONFIG)), places, size=16, num_views=70)
    assert metrics["psnr"] > 100
    assert metrics["gradient_energy_ratio"] == 1
    assert metrics["gradient_energy_ratio_of_sums"] == 1


def test_gradient_energy_ratio_is_the_mean_over_images(places: Places) -> None:
    class FirstIsSoft(Autoencoder):
        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def latents(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            return moments

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.cat((latents[:1] * 0.5, latents[1:]))

    metrics = reconstruction_metrics(FirstIsSoft(build_autoencoder(CONFIG)), places, size=16, num_views=4)
    energy = gradient_energy(places.render(RESERVED_VIEW_IDS + torch.arange(4), 16)[0])
    assert metrics["gradient_energy_ratio"] == pytest.approx((0.25 + 3) / 4)
    assert metrics["gradient_energy_ratio_of_sums"] == pytest.approx(
        (1 - 0.75 * energy[0] / energy.sum()).item()
    )


def test_point_response_of_a_decoder_that_repeats_each_latent(places: Places) -> None:
    class Repeating(Autoencoder):
        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(images.shape[0], 4, images.shape[2] // 8, images.shape[3] // 8)

        def latents(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            return moments

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            gains = torch.tensor([0.1, 0.2, 0.3, 0.0])[:, None, None]
            image = (latents * gains).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
            return image.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    response = point_response(Repeating(build_autoencoder(CONFIG)), places, size=16, num_views=70)
    assert response == pytest.approx([0.1, 0.2, 0.3, 0.0], rel=1e-5)


def test_reconstruction_picture_aligns_sizes(places: Places) -> None:
    picture = reconstruction_picture(
        Autoencoder(build_autoencoder(CONFIG)), places, sizes=(16, 32), columns=3
    )
    assert picture.shape == (4 * 32, 3 * 32, 3)
    assert picture.dtype == "uint8"
