"""Arrays in .npz files that need not fit in memory: written from parts, read by mapping the file.

The archives are numpy's own, uncompressed and without a date, so that equal arrays make equal files.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from model.messages import one_line
from model.whole_file import whole_file

__all__ = ["Parts", "mapped_array", "write_archive"]

_LOCAL_HEADER_BYTES = 30
_NO_DATE = (1980, 1, 1, 0, 0, 0)

Parts = tuple[tuple[int, ...], np.dtype[Any], Iterable[NDArray[Any]]]
"""An array's shape and dtype, and its parts along the first axis, in order."""


def write_archive(path: Path, arrays: Mapping[str, Parts]) -> None:
    """Write an .npz that appears whole or not at all, holding one part at a time in memory."""
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, (shape, dtype, parts) in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _NO_DATE), "w", force_zip64=True) as file:
                header = {
                    "descr": npy_format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                npy_format.write_array_header_1_0(file, header)
                for block in _checked(name, shape, dtype, parts):
                    file.write(block.data.cast("B"))


def mapped_array(path: Path, name: str) -> NDArray[Any]:
    """The array `name` of an .npz, mapped from the file where it is stored uncompressed, else read.

    Raises KeyError where the archive has no such array, ValueError where it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[name]
        with path.open("rb") as file:
            file.seek(info.header_offset)
            name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(_LOCAL_HEADER_BYTES))
            file.seek(name_bytes + extra_bytes, 1)
            version = npy_format.read_magic(file)
            read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            order: Any = "F" if fortran_order else "C"
            return np.memmap(path, dtype, "r", file.tell(), shape, order)
    except (OSError, ValueError, zipfile.BadZipFile, struct.error, tokenize.TokenError) as error:
        raise ValueError(f"{path} cannot be read as .npz: {one_line(error)}") from error


def _checked(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    rows = 0
    for part in parts:
        if part.dtype != dtype or part.shape[1:] != shape[1:]:
            raise ValueError(f"{name}: a part of {part.dtype} {part.shape} given for {dtype} {shape}")
        rows += len(part)
        yield np.ascontiguousarray(part)
    if rows != shape[0]:
        raise ValueError(f"{name}: parts of {rows} rows given for {shape[0]}")
