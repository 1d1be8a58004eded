"""If this fails, a run that dies while it writes leaves half a file where a whole one was."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from model.whole_file import whole_file, write_json


def test_whole_file_replaces_the_old_content_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_whole_file_leaves_the_old_content_and_nothing_else_after_a_failure(
    tmp_path: Path, kind: type[Exception]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ne")
            raise kind("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_is_whole_or_not_at_all_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "a.json"
    assert write_json(path, {"a": [1]}) == path
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    before = path.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": Path()})
    assert (path.read_text(), list(path.parent.iterdir())) == (before, [path])
