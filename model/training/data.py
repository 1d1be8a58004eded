"""What a run trains on: views of places, or a latents cache, and the autoencoder that both belong to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.progress import Progress
from torch import nn

from model.autoencoder import Autoencoder
from model.data.latent_shards import LatentShards
from model.data.latents import places_latents
from model.data.places import Places
from model.training.config import PLACES, TrainConfig
from model.training.source import CachedSource, Source, StreamedSource
from model.training.world import World

__all__ = ["TrainingData"]

# Pixels encoded at a time: 256 images of 256 px, about 6 GB of activations in bf16.
_ENCODING_PIXELS = 2**24
_SCALING_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """A run's data, before anything is computed of it."""

    config: TrainConfig
    module: AutoencoderKL
    labels: tuple[str, ...]
    digest: str
    """Of all that the samples depend on but the run's own configuration."""
    autoencoder_fingerprint: str
    downsampling: int
    latent_channels: int
    shards: LatentShards | None
    places: Places | None

    @classmethod
    def open(cls, config: TrainConfig, device: torch.device) -> TrainingData:
        """ValueError where data, autoencoder and configuration do not fit each other."""
        shards = places = None
        if config.data == PLACES:
            places = Places.load(device=device)
            labels, digest = places.labels, places.digest
        else:
            shards = LatentShards.open(config.data)
            labels, digest = shards.labels, shards.digest
            if shards.resolution != config.resolution:
                raise ValueError(
                    f"resolution: {config.resolution} given; the latents in {config.data} are of images of "
                    f"{shards.resolution} px"
                )
        autoencoder = Autoencoder.load(config.autoencoder_source)  # last, as it may have to be downloaded
        weights = autoencoder.weights_hash
        if shards is not None:
            side = config.resolution // autoencoder.downsampling
            shape = (2 * autoencoder.latent_channels, side, side)
            if shards.moments_shape != shape:
                raise ValueError(
                    f"data: {config.data} holds moments of shape {shards.moments_shape}; {shape} is accepted"
                )
            if shards.autoencoder_hash != weights:
                raise ValueError(
                    f"autoencoder: {config.autoencoder} with weights {weights[:12]} given; the latents in "
                    f"{config.data} were made with {shards.autoencoder_hash[:12]}"
                )
        return cls(
            config=config,
            module=autoencoder.module,
            labels=labels,
            digest=digest,
            autoencoder_fingerprint=_fingerprint(autoencoder.module, weights),
            downsampling=autoencoder.downsampling,
            latent_channels=autoencoder.latent_channels,
            shards=shards,
            places=places,
        )

    def source(self, world: World, progress: Progress) -> Source:
        """The samples on the rank's device; views of places are encoded once, by the main rank."""
        config, device = self.config, world.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        nn.Module.to(self.module, device=device, dtype=dtype)  # torch's own: diffusers' warns at every cast
        autoencoder = Autoencoder(self.module, micro_batch_pixels=_ENCODING_PIXELS)
        if self.shards is not None:
            return StreamedSource(
                self.shards,
                autoencoder,
                batch_size=config.batch_size,
                seed=config.seed,
                device=device,
                rank=world.rank,
                world_size=world.size,
            )
        assert self.places is not None
        with world.main_rank_first():
            cache = places_latents(
                self.places,
                autoencoder,
                size=config.resolution,
                num_views=config.num_views,
                folder=Path(config.output_dir) / "latents",
                progress=progress,
            )
        rows = config.rank_batch_size(world.size)
        return CachedSource(cache, rows=rows, seed=config.seed, rank=world.rank, world_size=world.size)


def _fingerprint(module: AutoencoderKL, weights_hash: str) -> str:
    """16 hex digits of all that latents depend on: the weights, as stored, and the scaling."""
    scaling = json.dumps({name: module.config.get(name) for name in _SCALING_FIELDS})
    return hashlib.sha256(f"{weights_hash} {scaling}".encode()).hexdigest()[:16]
