"""If this fails, an error of a library breaks our one line."""

from __future__ import annotations

from model.messages import one_line


def test_one_line_joins_lines_cuts_long_ones_and_is_never_empty() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("x" * 400)) == "x" * 300
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
