"""Log records with the id of the request that they belong to, plain or as JSON, one a line.

The id lives in a context variable, so code below the HTTP layer logs it without being handed it. Threads of
the engine serve many requests at once and name the id in the record themselves (`extra={"request_id":
...}`).
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
from typing import TextIO

__all__ = ["JsonFormatter", "adopt_library_logs", "configure_logging", "request_id_variable"]

request_id_variable: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "request_id",
    "color_message",
}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN_FORMAT = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"


class RequestIdFilter(logging.Filter):
    """Gives every record a `request_id`, without which the formats below could not name it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request_id_variable.get()
        return True


class PlainFormatter(logging.Formatter):
    """One line a record, and a trace's after it: what a client sent, such as a path, begins no other."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, request id, message, and whatever `extra` gave."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(level: str, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Send all records of the process to `stream` (default stderr) in one format.

    Called by the command line alone: a library that is imported leaves logging to its host.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter(_PLAIN_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def adopt_library_logs() -> None:
    """Let the records of libraries that install handlers of their own go where all others go.

    To be called once they are imported: their handlers come with the import and have a format of their own.
    """
    for name in ("diffusers", "huggingface_hub"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
