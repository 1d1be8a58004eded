"""An image file as the square of pixels that ADM trains on (Dhariwal and Nichol 2021, "Diffusion models beat
GANs on image synthesis"), and DiT and their successors after it.

Halve by box filters as long as the shorter side is at least twice the wanted one; resize bicubically to the
wanted shorter side; cut the middle out. Every rounding is theirs, and so is the conversion of grey, palette,
CMYK and 16-bit images: Pillow's to RGB, which drops alpha. Numpy and Pillow alone.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from model.messages import one_line

__all__ = ["BadImageError", "center_crop", "decode_image"]


_MAX_PIXELS = 2**27


class BadImageError(ValueError):
    """Bytes that are no image, or not a whole one."""


def decode_image(encoded: bytes, size: int) -> NDArray[np.uint8]:
    """Pixels (size, size, 3) of an image file's content; BadImageError says why there are none."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return center_crop(image.convert("RGB"), size)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # whose own words are the address of a Python object
        raise BadImageError("not an image, or of an unknown format") from error
    except Exception as error:  # the decoders of a damaged file raise anything
        raise BadImageError(one_line(error)) from error


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The middle (size, size, 3) of an RGB image, scaled so that its shorter side is `size`.

    BadImageError for a strip of pixels, which ADM would make gigabytes of.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wanted = (round(image.width * scale), round(image.height * scale))
    if wanted[0] * wanted[1] > _MAX_PIXELS:
        raise BadImageError(f"{image.width} x {image.height} pixels, too long and thin to resize")
    pixels = np.asarray(image.resize(wanted, Image.Resampling.BICUBIC))  # (H, W, 3)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
