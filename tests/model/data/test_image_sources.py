"""If these fail, images are trained on under other classes than theirs, or a wrong list is found out late."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from model.data.image_sources import open_image_source
from tests.image_files import SYNSETS, jpeg, labelled, save_image_folder, save_tar


def test_image_folder_is_sorted_by_class_and_path(tmp_path: Path) -> None:
    root = save_image_folder(tmp_path / "train", 2, ["b", "a"])
    (root / "a" / "deeper").mkdir()
    (root / "a" / "deeper" / "z.png").write_bytes(jpeg(9))
    (root / "a" / "notes.txt").write_text("no image")
    (root / "readme.txt").write_text("no class")
    source = open_image_source(root)
    assert source.labels == ("a", "b")
    assert [source.name(i) for i in range(len(source))] == [
        "a/a_0.JPEG",
        "a/a_1.JPEG",
        "a/deeper/z.png",
        "b/b_0.JPEG",
        "b/b_1.JPEG",
    ]
    assert source.class_ids.tolist() == [0, 0, 0, 1, 1]
    assert source.read(2) == jpeg(9)


def test_tar_shards_join_images_and_labels(tmp_path: Path) -> None:
    second = [*labelled("x/0001", jpeg(2), 1, as_json=True), ("x/0001.txt", b"a caption")]
    save_tar(tmp_path / "train-001.tar", second)
    save_tar(
        tmp_path / "train-000.tar", [*labelled("0000", jpeg(0), 2), *labelled("0001.v2", jpeg(1), 0)[:0]]
    )
    source = open_image_source(tmp_path)
    assert source.labels == ("class 0", "class 1", "class 2")
    assert [source.name(i) for i in range(2)] == ["train-000.tar/0000.jpg", "train-001.tar/x/0001.jpg"]
    assert source.class_ids.tolist() == [2, 1]
    assert [source.read(i) for i in range(2)] == [jpeg(0), jpeg(2)]
    one = open_image_source(tmp_path / "train-001.tar")
    assert len(one) == 1


def test_digest_depends_on_names_sizes_and_classes(tmp_path: Path) -> None:
    root = save_image_folder(tmp_path / "a", 2)
    digest = open_image_source(root).digest
    assert open_image_source(save_image_folder(tmp_path / "b", 2)).digest == digest
    (tmp_path / "names").write_text("x\ny\nz\n")
    assert open_image_source(root, str(tmp_path / "names")).digest != digest
    path = root / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG"
    path.write_bytes(path.read_bytes() + b"\0")
    assert open_image_source(root).digest != digest


@pytest.mark.parametrize(
    "text",
    [
        "tench\ngoldfish\nshark\n",
        json.dumps(["tench", "goldfish", "shark"]),
        json.dumps(dict(zip(SYNSETS, ("tench", "goldfish", "shark"), strict=True)) | {"n9": "other"}),
        "n01484850 shark\nn01440764 tench\nn01443537 goldfish\nn9 other\n",
    ],
    ids=["lines", "list", "object", "synset-lines"],
)
def test_labels_name_sub_folders(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    source = open_image_source(save_image_folder(tmp_path / "train", 1), str(tmp_path / "labels"))
    assert source.labels == ("tench", "goldfish", "shark")


def test_labels_imagenet_names_synsets_and_numbers(tmp_path: Path) -> None:
    folders = [*SYNSETS, "n02012849", "n03126707", "n04355933", "n04356056"]  # the last four: pairs of names
    source = open_image_source(save_image_folder(tmp_path / "train", 1, sorted(folders)), "imagenet")
    assert source.labels[:3] == ("tench", "goldfish", "great white shark")
    assert len(set(source.labels)) == 7
    save_tar(tmp_path / "tars" / "a.tar", labelled("0", jpeg(0), 2))
    numbered = open_image_source(tmp_path / "tars", "imagenet")
    assert len(numbered.labels) == 1000
    assert numbered.labels[2] == "great white shark"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ntwo\n", "labels: 2 given; the source has 3 sub-folders"),
        (
            json.dumps({SYNSETS[0]: "tench"}),
            f"has no name for 2 of 3 sub-folders, {SYNSETS[1]}, {SYNSETS[2]}",
        ),
        ("a\nb\na\n", "labels: 'a' names two classes"),
        ("[1, 2, 3]", "has entries that are not names"),
    ],
    ids=["number", "nameless", "twice", "no-names"],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    root = save_image_folder(tmp_path / "train", 1)
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_image_source(root, str(tmp_path / "labels"))


def test_folders_that_are_no_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source: .* given; a folder, a .tar file or `places` is accepted"):
        open_image_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no sub-folders; one for each class is accepted"):
        open_image_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images; files that end in"):
        open_image_source(tmp_path)
    with pytest.raises(ValueError, match="has no name for 1 of 1 sub-folders, cats"):
        open_image_source(save_image_folder(tmp_path / "other", 1, ["cats"]), "imagenet")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", jpeg(0))], "0.jpg has no label; a .cls or .json beside it"),
        ([("0.jpg", jpeg(0)), ("0.json", b'{"caption": "x"}')], "0.jpg has no label"),
        ([("0.jpg", jpeg(0)), ("0.cls", b"cat")], "0.cls is no label"),
        ([("0.jpg", jpeg(0)), ("0.json", b'{"label": "cat"}')], "0.json says 'cat'; a class's number"),
        ([("0.jpg", jpeg(0)), ("0.json", b"[" * 50_000)], "0.json is no label"),
        ([("0.jpg", jpeg(0)), ("0.cls", b"-1")], "0.cls says -1"),
        (labelled("0", jpeg(0), 2**40), f"0.cls says {2**40}; a class's number from 0 to 1048575 is"),
        ([("0.jpg", jpeg(0)), ("0.png", jpeg(0)), ("0.cls", b"1")], "0.png is a second image beside 0.jpg"),
        ([("0.cls", b"1")], "no images in 1 tar files"),
        (labelled("0", jpeg(0), 3), "labels: 3 given; the source has an image of class 3"),
    ],
    ids=[
        "none",
        "other-json",
        "text",
        "json-text",
        "deep",
        "negative",
        "stray",
        "second",
        "no-image",
        "beyond-names",
    ],
)
def test_tar_shards_that_do_not_fit_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = save_tar(tmp_path / "a.tar", members)
    (tmp_path / "labels").write_text("x\ny\nz\n")
    with pytest.raises(ValueError, match=message):
        open_image_source(path, str(tmp_path / "labels"))


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff")
    save_tar(tmp_path / "a.tar", labelled(name, jpeg(0), 0))
    root = save_image_folder(tmp_path / "train", 1)
    (root / SYNSETS[0] / f"{name}.jpg").write_bytes(jpeg(0))
    for source in (open_image_source(tmp_path / "a.tar"), open_image_source(root)):
        assert any(source.name(index).endswith(f"{name}.jpg") for index in range(len(source)))
        assert len(source.digest) == 64


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "a.tar", labelled("0", jpeg(0), 0))
    path.write_bytes(b"x" * 2048)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
        open_image_source(path)


@pytest.mark.parametrize("damage", ["letters", "zeros", "cut"])
def test_a_tar_that_is_damaged_in_the_middle_is_refused(tmp_path: Path, damage: str) -> None:
    """Its first images can be read; the others would be missing without a word."""
    path = save_tar(tmp_path / "a.tar", [m for i in range(3) for m in labelled(str(i), jpeg(i), i)])
    content = path.read_bytes()
    header = content.index(b"1.jpg")  # a header begins with its member's name
    block = {"letters": b"x" * 512, "zeros": bytes(512), "cut": content[header:][:100]}[damage]
    rest = b"" if damage == "cut" else content[header + 512 :]
    path.write_bytes(content[:header] + block + rest)
    message = rf"a\.tar cannot be read as an uncompressed tar \(neither a header .* at byte {header}\)"
    with pytest.raises(ValueError, match=message):
        open_image_source(path)


def test_a_tar_may_end_without_blocks_of_zeros(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "a.tar", labelled("0", jpeg(0), 0))
    content = path.read_bytes()
    num_blocks = -(-len(content.rstrip(b"\0")) // 512)  # the label's block is the last that is not zeros
    path.write_bytes(content[: num_blocks * 512])
    assert len(open_image_source(path)) == 1


def test_class_ids_are_integers(tmp_path: Path) -> None:
    assert open_image_source(save_image_folder(tmp_path / "a", 1)).class_ids.dtype == np.int64
