"""If this fails, an error of a library breaks our one line."""

from __future__ import annotations

from model.messages import one_line, unknown_field


def test_one_line_joins_lines_cuts_long_ones_and_is_never_empty() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("x" * 400)) == "x" * 300
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_unknown_field_names_the_nearest_or_all() -> None:
    near, far = (unknown_field(name, ("batch_size", "seed"), "a run") for name in ("batchsize", "epochs"))
    assert near == "batchsize: unknown field of a run; did you mean batch_size?"
    assert far == "epochs: unknown field of a run; it has batch_size, seed"
