"""Errors as HTTP answers, in each dialect's own form: one table from our errors to status and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from starlette.responses import JSONResponse, Response

from m2lite.errors import BadModelError, ContextError, M2liteError, ResourceError, UsageError

Dialect = Literal["openai", "anthropic"]


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Refused(M2liteError):
    """A request that is turned away before the model sees it."""

    def __init__(
        self, status: int, code: str, what: str, todo: str = "", *, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(what, todo)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


class _Known(NamedTuple):
    status: int
    code: str


# Our errors, the more special ones first.
_ERRORS: list[tuple[type[Exception], _Known]] = [
    (ContextError, _Known(400, "context_length_exceeded")),
    (UsageError, _Known(400, "invalid_value")),
    (ResourceError, _Known(503, "out_of_memory")),
    (BadModelError, _Known(500, "bad_model")),
    (M2liteError, _Known(500, "failed")),
    (Exception, _Known(500, "internal_error")),
]
# Status -> the type that OpenAI's and Anthropic's clients know.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    422: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}


def dialect_of(path: str) -> Dialect:
    """The dialect in which what is asked at `path` is answered."""
    return "anthropic" if path == "/v1/messages" or path.startswith("/v1/messages/") else "openai"


def status_of(error: Exception) -> int:
    return error.status if isinstance(error, Refused) else _known(error).status


def code_of(error: Exception) -> str:
    return error.code if isinstance(error, Refused) else _known(error).code


def _known(error: Exception) -> _Known:
    return next(known for kind, known in _ERRORS if isinstance(error, kind))


def error_body(dialect: Dialect, error: Exception, request_id: str) -> dict[str, Any]:
    """The JSON of an error, as an answer or as an event of a stream."""
    of_openai, of_anthropic = _TYPES.get(status_of(error), _TYPES[500])
    text = str(error)
    if not isinstance(error, M2liteError):
        text = f"Internal error, {type(error).__name__}: {error}. Please report it."
    if dialect == "anthropic":
        if isinstance(error, ContextError):  # the words at which its clients sum their conversation up
            text = f"prompt is too long: {error.needed} tokens > {error.limit} maximum"
        return {"type": "error", "error": {"type": of_anthropic, "message": text}, "request_id": request_id}
    param = error.param if isinstance(error, Refused) else None
    told = {"message": text, "type": of_openai, "param": param, "code": code_of(error), "request_id": request_id}
    return {"error": told}


def error_response(dialect: Dialect, error: Exception, request_id: str) -> Response:
    headers = error.headers if isinstance(error, Refused) else {}
    return JSONResponse(error_body(dialect, error, request_id), status_of(error), headers)
