"""JSON responses that can carry whatever a client sent, and errors as responses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from service.api.openai import openai_error

if TYPE_CHECKING:
    from service.errors import ServiceError

__all__ = ["AsciiJSONResponse", "error_body", "error_response"]


class AsciiJSONResponse(JSONResponse):
    """JSON with everything beyond ASCII escaped: a lone surrogate in a request must not break the answer."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """`{"error": {"code", "message", "request_id", ...}}`."""
    return {"error": {"code": error.code, "message": str(error), "request_id": request_id} | error.details()}


def error_response(error: ServiceError, request_id: str, *, openai: bool = False) -> AsciiJSONResponse:
    """`error_body` with the error's status and headers, or OpenAI's shape, where the id is in the header
    alone."""
    if openai:
        status, content = openai_error(error)
    else:
        status, content = error.status, error_body(error, request_id)
    return AsciiJSONResponse(content, status_code=status, headers=error.headers())
