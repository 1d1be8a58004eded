"""service/logs.py: if this fails, an operator cannot find what happened to a request."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from service.logs import adopt_library_logs, configure_logging, request_id_variable


@pytest.fixture(autouse=True)
def _restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_records_carry_request_id_extras_and_traces() -> None:
    stream = io.StringIO()
    configure_logging("info", as_json=True, stream=stream)
    token = request_id_variable.set("abc")
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        logging.getLogger("service.test").exception("went %s", "wrong", extra={"status": 500})
    finally:
        request_id_variable.reset(token)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "went wrong"
    assert (record["request_id"], record["status"], record["level"]) == ("abc", 500, "error")
    assert "line two" in record["exception"]
    assert record["time"].endswith("Z")


def test_an_explicit_request_id_wins_and_plain_records_show_it() -> None:
    stream = io.StringIO()
    configure_logging("warning", as_json=False, stream=stream)
    logging.getLogger("service.test").info("not shown")
    logging.getLogger("service.test").warning("shown", extra={"request_id": "r-7"})
    assert stream.getvalue().count("\n") == 1
    assert "[r-7] shown" in stream.getvalue()


def test_what_a_client_sent_begins_no_line_of_plain_records() -> None:
    stream = io.StringIO()
    configure_logging("info", as_json=False, stream=stream)
    logging.getLogger("service.test").info("GET %s", "/é\n2026 CRITICAL forged\r\x1b[31m\x85\u2028")
    assert stream.getvalue().endswith(r"GET /é\n2026 CRITICAL forged\r\x1b[31m\x85\u2028" + "\n")
    assert len(stream.getvalue().splitlines()) == 1


def test_records_of_libraries_with_handlers_of_their_own_join_the_others() -> None:
    stream, own = io.StringIO(), io.StringIO()
    configure_logging("info", as_json=True, stream=stream)
    library = logging.getLogger("diffusers")
    library.addHandler(logging.StreamHandler(own))
    library.propagate = False
    adopt_library_logs()
    logging.getLogger("diffusers.models").warning("heard")
    assert json.loads(stream.getvalue())["message"] == "heard"
    assert own.getvalue() == ""
