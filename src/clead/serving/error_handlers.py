"""Every error of the application is answered as a problem (RFC 9457)."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from clead.inference.problems import DETAILS, Problem, answer, first_error, standard


async def _refused(request: Request, error: Problem) -> Response:
    return answer(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = {method.strip() for method in headers.get("Allow", "").split(",") if method.strip()}
        allowed |= {"OPTIONS", *(("HEAD",) if "GET" in allowed else ())}
        headers["Allow"] = ", ".join(sorted(allowed))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    if error.status_code in DETAILS:
        return answer(standard(error.status_code, headers))
    return answer(Problem(error.status_code, str(error.detail), headers))


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    return answer(Problem(422, first_error(error.errors())))


async def _client_gone(request: Request, error: ClientDisconnect) -> Response:
    return answer(Problem(400, "the client went away before its request had arrived"))


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, MemoryError):
        text = "the server has not enough memory for this request; send fewer or smaller images, or come back later"
        return answer(Problem(503, text, {"Retry-After": "10"}))
    return answer(standard(500))


HANDLERS: dict[Any, Any] = {
    Problem: _refused,
    HTTPException: _http_error,
    RequestValidationError: _invalid,
    ClientDisconnect: _client_gone,
    Exception: _failed,
}
"""Kind of error → what answers it, as FastAPI takes them."""
