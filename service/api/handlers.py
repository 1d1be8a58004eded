"""Every error as a response of one shape: ours as they are, FastAPI's and Starlette's translated."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service.api.openai import openai_accepted, speaks_openai
from service.api.responses import error_response
from service.api.schemas import MAX_CLASSES, MAX_TEXT, ClassQuery, GenerateRequest
from service.errors import (
    InvalidField,
    InvalidJSON,
    MethodNotAllowed,
    NotFound,
    RequestError,
    ServiceError,
    UnknownField,
    UnsupportedMediaType,
)
from service.logs import request_id_variable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request
    from starlette.responses import Response

    from service.runtime import Runtime

__all__ = ["add_error_handlers"]

_INTEGERS = ("resolution", "num_images", "steps", "seed", "image_index", "quality", "limit", "previews")
_INTEGERS_OF_OPENAI = ("n", "output_compression", "partial_images", "steps", "seed", "image_index")
_NUMBERS = ("cfg_scale", "timeout_s")
_OUT_OF_RANGE = ("greater_than_equal", "less_than_equal")


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers with an app."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    runtime: Runtime = request.app.state.runtime
    if request.method == "POST":
        runtime.metrics.count_error(error)
    return error_response(error, request_id_variable.get(), openai=speaks_openai(request.scope))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    runtime: Runtime = request.app.state.runtime
    try:
        accepted = _accepted(request, runtime.catalog.accepted(_model_name(error.body)))
    except ServiceError as not_ready:  # no model, no limits: what is wrong with the body can wait
        return await _service_error(request, not_ready)
    return await _service_error(request, _translate(request, error.errors(), accepted))


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return await _service_error(
            request, NotFound(f"{request.url.path}: no such path; GET /docs lists them")
        )
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        message = f"{request.method} {request.url.path}: not allowed; this path accepts {allow}"
        return await _service_error(request, MethodNotAllowed(message, allow=allow))
    return await _service_error(request, _unreadable(error.__cause__))


def _unreadable(cause: BaseException | None) -> InvalidJSON:
    """Why FastAPI could not read a body as JSON, for other reasons than its syntax."""
    if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError) and "digits" in str(cause):
        most = sys.get_int_max_str_digits()
        return InvalidJSON(f"body: a number too long to read given; up to {most} digits are accepted")
    return InvalidJSON("body: not readable; a JSON object in UTF-8 is accepted")


def _accepted(request: Request, accepted: Mapping[str, str]) -> Mapping[str, str]:
    """What each field of the request may be, from what the fields of `/generate` may be."""
    if request.method == "GET":
        texts = {"q": f"text of up to {MAX_TEXT} characters", "limit": f"1 to {MAX_CLASSES}"}
        return {name: (texts | dict(accepted))[name] for name in ClassQuery.model_fields}
    if speaks_openai(request.scope):
        return openai_accepted(accepted)
    return {name: accepted[name] for name in GenerateRequest.model_fields}


def _translate(request: Request, problems: Any, accepted: Mapping[str, str]) -> RequestError:
    """The first of pydantic's problems as an error of ours."""
    first = problems[0]
    location = first["loc"][1:]  # without "body" or "query"
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "invalid")
        return InvalidJSON(
            f"body: not JSON at character {first['loc'][-1]} ({reason}); a JSON object is accepted"
        )
    if not location or not isinstance(location[0], str):
        return _not_an_object(request, first)
    name = location[0]
    if first["type"] == "extra_forbidden":
        return UnknownField(name, first["input"], ", ".join(accepted))
    value = None if first["type"] == "missing" else first["input"]
    kind = "" if first["type"] in _OUT_OF_RANGE else _kind(request, name)
    return InvalidField(name, value, f"{kind}{accepted[name]}")


def _kind(request: Request, name: str) -> str:
    integers = _INTEGERS_OF_OPENAI if speaks_openai(request.scope) else _INTEGERS
    return "an integer, " if name in integers else "a number, " if name in _NUMBERS else ""


def _not_an_object(request: Request, problem: Mapping[str, Any]) -> RequestError:
    content_type = request.headers.get("content-type", "")
    if not _is_json(content_type):
        shown = content_type or "none"
        return UnsupportedMediaType(f"content-type: {shown} given; this path accepts application/json")
    value = None if problem["type"] == "missing" else problem["input"]
    return InvalidField("body", value, "a JSON object", by="this path")


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def _model_name(body: object) -> str | None:
    name = body.get("model") if isinstance(body, dict) else None
    return name if isinstance(name, str) else None
