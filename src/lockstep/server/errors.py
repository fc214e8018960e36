"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lockstep.server.openai import FIELD_NAMES

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is answered with this HTTP status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, str | int | None] = {
            "message": self.message,
            "type": TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        if self.retry_after_s is not None:
            error["retry_after"] = max(1, round(self.retry_after_s))
        return {"error": error}

    def response(self) -> Response:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        # Plain ASCII: a message may quote what the client sent, be it half a surrogate pair.
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


def explain(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's findings, with the path to the field."""
    first = errors[0]
    path = _path(first)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first.get('ctx', {}).get('error', message)}.")
    if first["loc"] == ("body",) and isinstance(first["input"], bytes):
        # Other types may come from any web page that the user has open, which browsers do not ask us about.
        return ApiError(415, "This is not sent as JSON: add the header `content-type: application/json`.")
    others = len({_path(error) for error in errors}) - 1
    more = f" ({others} more)" if others else ""
    return ApiError(400, f"{path}: {message}{more}" if path else message + more, param=path or None)


def _path(error: Any) -> str:
    """Without the names that pydantic gives to the kinds of value a field may have."""
    return ".".join(str(part) for part in error["loc"] if isinstance(part, int) or part in FIELD_NAMES)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.record.error = error.message
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _api_error(request, explain(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"There is no {request.url.path} here.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = messages.get(error.status_code) or str(error.detail) or HTTPStatus(error.status_code).phrase
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _crash(_: Request, error: Exception) -> Response:
    message = "The server failed on this request; its log says why."
    return ApiError(500, message, code="internal_error").response()


def install(app: FastAPI) -> None:
    """Answer every failure in OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crash)
