"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from chameleon.errors import BadInput
from chameleon.serve.worker import GenerationFailed, Overloaded, Stopped

RETRY_AFTER_SECONDS = 1
KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
logger = logging.getLogger(__name__)


class ApiError(HTTPException):
    """A refused request."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.status, self.message, self.param = status, message, param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to an exception: what the client did wrong, or that the server failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadInput):
        return ApiError(400, str(error))
    if isinstance(error, Overloaded):
        return ApiError(429, f"too many requests: {error}", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, Stopped):
        return ApiError(503, str(error), headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, GenerationFailed):
        logger.error("%s", error)
        return ApiError(500, str(error))
    if isinstance(error, TimeoutError):
        return ApiError(408, "the request took too long")
    logger.exception("a request failed", exc_info=error)
    return ApiError(500, "internal error, see the server's log")


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error.status, error.message, error.param), error.status, dict(error.headers or {}))


def validation_message(error: RequestValidationError) -> tuple[str, str | None]:
    """Return the first problem of a body, and the field it is in."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(path) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{param}: {message}" if param else message), param


def add_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's form."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return respond(as_api_error(error))

    async def handle_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = validation_message(error)
        return respond(ApiError(400, message, param=param))

    async def handle_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return respond(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    for kind in (ApiError, BadInput, GenerationFailed, Overloaded, Stopped, TimeoutError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, handle_invalid)
    app.add_exception_handler(HTTPException, handle_http)
