"""Small JPEGs and the layouts that image data sets come in, as a folder and as tar files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n01484850")


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """An image of smooth random colours, `size` wide and high."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "jpeg")
    return buffer.getvalue()


def save_image_folder(root: Path, per_class: int = 4, classes: Sequence[str] = SYNSETS) -> Path:
    """`classes` as sub-folders of `per_class` images."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for image in range(per_class):
            (root / name / f"{name}_{image}.JPEG").write_bytes(jpeg(100 * number + image))
    return root


def save_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labelled(key: str, content: bytes, class_id: int, *, as_json: bool = False) -> list[tuple[str, bytes]]:
    """An image's members in webdataset's layout."""
    if as_json:
        return [(f"{key}.json", json.dumps({"label": class_id}).encode()), (f"{key}.jpg", content)]
    return [(f"{key}.jpg", content), (f"{key}.cls", str(class_id).encode())]
