"""JSON responses that can carry whatever a client sent, and errors as responses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from service.errors import ServiceError

__all__ = ["AsciiJSONResponse", "error_response"]


class AsciiJSONResponse(JSONResponse):
    """JSON with everything beyond ASCII escaped: a lone surrogate in a request must not break the answer."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: ServiceError, request_id: str) -> AsciiJSONResponse:
    """`{"error": {"code", "message", "request_id", ...}}` with the error's status and headers."""
    body = {"code": error.code, "message": str(error), "request_id": request_id} | error.details()
    return AsciiJSONResponse({"error": body}, status_code=error.status, headers=error.headers())
