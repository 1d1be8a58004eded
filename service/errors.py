"""What can go wrong, in one tree. The class carries the HTTP status and a stable `code`; one handler
renders them all.

ServiceError                   500 internal_error
|-- RequestError               400 bad_request            the client's to mend
|   |-- InvalidJSON            400 invalid_json
|   |-- Unauthorized           401 invalid_api_key
|   |-- NotFound               404 not_found
|   |-- MethodNotAllowed       405 method_not_allowed
|   |-- BodyTimeout            408 body_timeout
|   |-- LoadInProgress         409 load_in_progress
|   |-- LastModel              409 last_model
|   |-- PayloadTooLarge        413 payload_too_large
|   |-- UnsupportedMediaType   415 unsupported_media_type
|   |-- IdempotencyKeyReused   422 idempotency_key_reused
|   |-- UnusableModel          422 unusable_model
|   `-- InvalidField           422 invalid_field          names field, value and what is accepted
|       `-- UnknownField       422 unknown_field
|-- Retryable                  503 unavailable            the same request may succeed later: Retry-After
|   |-- QueueFull              429 queue_full
|   |-- RateLimited            429 rate_limited
|   |-- QuotaExceeded          429 quota_exceeded
|   |-- NotReady               503 not_ready
|   |-- Draining               503 draining
|   `-- EngineStopped          503 engine_stopped
|-- GenerationFailed           500 generation_failed      this request's work failed; others go on
|-- ModelLoadFailed            500 model_load_failed      what was served before is served on
|-- InsufficientMemory         507 insufficient_memory    for a further model; likewise
`-- DeadlineExceeded           504 deadline_exceeded      not finished within its timeout_s

StartupError and EngineFailure are never sent: the process ends with one line and exit code 2 or 1.
"""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

__all__ = [
    "BodyTimeout",
    "DeadlineExceeded",
    "Draining",
    "EngineFailure",
    "EngineStopped",
    "GenerationFailed",
    "IdempotencyKeyReused",
    "InsufficientMemory",
    "InvalidField",
    "InvalidJSON",
    "LastModel",
    "LoadInProgress",
    "MethodNotAllowed",
    "ModelLoadFailed",
    "NotFound",
    "NotReady",
    "PayloadTooLarge",
    "QueueFull",
    "QuotaExceeded",
    "RateLimited",
    "RequestError",
    "Retryable",
    "ServiceError",
    "StartupError",
    "Unauthorized",
    "UnknownField",
    "UnsupportedMediaType",
    "UnusableModel",
    "shown",
]

_SHOWN_CHARACTERS = 80


class ServiceError(Exception):
    """An error with a status, a code that programs may rely on, and a message for people."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def details(self) -> dict[str, Any]:
        """What the error body says beside code, message and request id."""
        return {}

    def headers(self) -> dict[str, str]:
        """Response headers that belong to the status."""
        return {}


class RequestError(ServiceError):
    """The request cannot be served as it is."""

    status = 400
    code = "bad_request"


class InvalidJSON(RequestError):
    """The body is not JSON."""

    code = "invalid_json"


class Unauthorized(RequestError):
    """There is no key, or none that this server knows; the message does not repeat it."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str, *, key_given: bool) -> None:
        super().__init__(message)
        self.key_given = key_given

    def headers(self) -> dict[str, str]:
        reason = ', error="invalid_token"' if self.key_given else ""  # RFC 6750, section 3
        return {"WWW-Authenticate": f'Bearer realm="lamamba"{reason}'}


class NotFound(RequestError):
    """There is no such path, or no such model."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The path exists, with other methods."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str | None = None) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow} if self.allow else {}


class BodyTimeout(RequestError):
    """The body did not come in time."""

    status = 408
    code = "body_timeout"


class LoadInProgress(RequestError):
    """A model is being loaded, or has two versions already: another load has to wait."""

    status = 409
    code = "load_in_progress"


class LastModel(RequestError):
    """A server without a model is none."""

    status = 409
    code = "last_model"


class PayloadTooLarge(RequestError):
    """The body is over the limit, which says nothing of what is in it."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(RequestError):
    """The body is of a type that this path does not read."""

    status = 415
    code = "unsupported_media_type"


class IdempotencyKeyReused(RequestError):
    """The key belongs to another request."""

    status = 422
    code = "idempotency_key_reused"


class UnusableModel(RequestError):
    """The folder is no model, or one that this server cannot run; the message says why."""

    status = 422
    code = "unusable_model"


class InvalidField(RequestError):
    """One field's value is not accepted: `field: value given; this model accepts ...`."""

    status = 422
    code = "invalid_field"

    def __init__(self, field: str, value: object, accepted: str, *, by: str = "this model") -> None:
        super().__init__(f"{field}: {shown(value)} given; {by} accepts {accepted}")
        self.field = field
        self.value = value
        self.accepted = accepted
        self.by = by

    def details(self) -> dict[str, Any]:
        return {"field": self.field, "value": _json_value(self.value), "accepted": self.accepted}


class UnknownField(InvalidField):
    """A field that the request does not have: a typing error must not pass for a setting."""

    code = "unknown_field"

    def __init__(self, field: str, value: object, accepted: str) -> None:
        super().__init__(field, value, accepted, by="this request")


class Retryable(ServiceError):
    """Nothing is wrong with the request; the server cannot take it now."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class QueueFull(Retryable):
    """As many images wait as may wait."""

    status = 429
    code = "queue_full"

    @classmethod
    def of(cls, *, waiting: int, given: int, accepted: int, retry_after_s: float) -> QueueFull:
        """Said in numbers of images: those that wait, those of the request, and the most that may wait."""
        return cls(
            f"queue: {waiting} images wait and {given} more were given; this server accepts {accepted}",
            retry_after_s=retry_after_s,
        )


class RateLimited(Retryable):
    """The client has asked for as many images as a minute allows."""

    status = 429
    code = "rate_limited"


class QuotaExceeded(Retryable):
    """The client has had its images of the day."""

    status = 429
    code = "quota_exceeded"


class NotReady(Retryable):
    """The models are still being loaded."""

    code = "not_ready"


class Draining(Retryable):
    """The process is about to end and finishes only what it has accepted."""

    code = "draining"


class EngineStopped(Retryable):
    """The engine's thread has ended; liveness fails, so whoever supervises the process restarts it."""

    code = "engine_stopped"


class GenerationFailed(ServiceError):
    """The work of one request failed on the device; its neighbours go on."""

    code = "generation_failed"


class ModelLoadFailed(ServiceError):
    """A model could not be loaded for another reason than its folder or the memory."""

    code = "model_load_failed"


class InsufficientMemory(ServiceError):
    """The device has no room for a further model."""

    status = 507
    code = "insufficient_memory"


class DeadlineExceeded(ServiceError):
    """The request was not finished in the time that it had, and has been given up."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self, timeout_s: float, *, queue_s: float, steps_done: int, steps: int) -> None:
        super().__init__(
            f"timeout_s: {timeout_s:g} s have passed; the request waited {queue_s:.3g} s for a slot "
            f"and did {steps_done} of {steps} steps"
        )
        self.queue_s = queue_s
        self.steps_done = steps_done
        self.steps = steps

    def details(self) -> dict[str, Any]:
        return {"queue_s": round(self.queue_s, 6), "steps_done": self.steps_done, "steps": self.steps}


class StartupError(Exception):
    """The process cannot start as it was asked to; the message is one line."""


class EngineFailure(Exception):
    """The engine has died while the process served: only another process can go on."""


def shown(value: object) -> str:
    """A value as a message shows it: in JSON's notation, so that "5" and 5 look different, and never long."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _json_value(value: object) -> object:
    """A value as an error body repeats it: numbers and short strings as they are, else as shown."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else shown(value)  # NaN and Infinity are not JSON
    if isinstance(value, int):
        return value if abs(value) < 2**63 else shown(value)
    if isinstance(value, str) and len(value) <= _SHOWN_CHARACTERS:
        return value
    return shown(value)
