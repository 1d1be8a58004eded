"""`lamamba prepare-latents`: images or `places` into a latents cache to train from."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from model.launched import launched_local_rank, launched_local_size, launched_rank, launched_world_size
from model.usage import usage_errors

__all__ = ["PREPARE_EXAMPLES", "prepare_latents_command"]

PREPARE_EXAMPLES = (
    "Examples:  lamamba prepare-latents imagenet/train latents/imagenet-256 --labels imagenet "
    "--autoencoder stabilityai/sd-vae-ft-mse   |   lamamba prepare-latents places latents/places "
    "--views 100000   |   torchrun --nproc-per-node 8 -m model.cli prepare-latents shards latents/256 "
    "--autoencoder FOLDER"
)
_PLACES = "places"


def prepare_latents_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with a sub-folder for each class, a folder of webdataset's .tar files, "
            "or `places` (a folder of that name is ./places)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder of the cache; the same command goes on with it.")],
    resolution: Annotated[int, typer.Option(help="Pixels a side, after ADM's centre crop.")] = 256,
    autoencoder: Annotated[
        str, typer.Option(help="An AutoencoderKL's folder or hub id; `places` is the shipped one.")
    ] = _PLACES,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Names of the classes: a file (lines, JSON list or object), or `imagenet`; "
            "by default the sub-folders' names."
        ),
    ] = None,
    views: Annotated[int | None, typer.Option(help="Of `places`: how many views; by default 100000.")] = None,
    dtype: Annotated[
        str, typer.Option(help="What the encoder computes in: float32 or bfloat16.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Images encoded at a time, each as two flips.")] = 64,
    shard_images: Annotated[int, typer.Option(help="Images of a shard.")] = 8192,
    max_bad_share: Annotated[
        float, typer.Option(help="Of the images: that may be unreadable, and are left out.")
    ] = 0.001,
    decode_threads: Annotated[
        int | None, typer.Option(help="Threads that decode; by default the cores of this process.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First check the finished shards against their checksums.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default CUDA if there.")] = None,
) -> None:
    """Encode images once into shards of latents; the same command resumes, torchrun shares the work."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with usage_errors(), ExitStack() as stack:
        if views is not None and source != _PLACES:
            raise ValueError(f"views: {views} given for {source}; only places has views")
        if labels is not None and source == _PLACES:
            raise ValueError(f"labels: {labels} given; places has its own")
        if decode_threads is not None and decode_threads < 1:
            raise ValueError(f"decode_threads: {decode_threads} given; 1 or more is accepted")
        rank, world_size = launched_rank(), launched_world_size()
        from model.cpu_threads import available_cpu_threads
        from model.data.image_batches import DecodedImages, ImageBatches, PlacesViews
        from model.data.image_sources import open_image_source
        from model.data.places import Places
        from model.data.prepare_latents import PrepareConfig, prepare_latents
        from model.device import make_current, resolve_device
        from model.pretrained import default_model_dir
        from model.progress import progress_display

        config = PrepareConfig(
            dtype=dtype,
            batch_size=batch_size,
            shard_images=shard_images,
            max_bad_share=max_bad_share,
            rank=rank,
            world_size=world_size,
        )
        where = resolve_device(device)
        if world_size > 1 and where.type == "cuda":
            where = resolve_device(f"cuda:{launched_local_rank()}")
        make_current(where)
        images: ImageBatches
        if source == _PLACES:
            places = Places.load(device=where)
            images = PlacesViews(places, resolution=resolution, num_views=100_000 if views is None else views)
        else:
            images = DecodedImages(
                open_image_source(Path(source), labels),
                resolution=resolution,
                device=where,
                num_threads=decode_threads or max(1, available_cpu_threads() // launched_local_size()),
            )
        prepare_latents(
            images,
            out,
            autoencoder=str(default_model_dir(256) / "vae") if autoencoder == _PLACES else autoencoder,
            device=where,
            config=config,
            verify=verify,
            progress=stack.enter_context(progress_display()) if rank == 0 else None,
        )
    if rank == 0:
        typer.echo(f"{out}: ready for `lamamba train`")
