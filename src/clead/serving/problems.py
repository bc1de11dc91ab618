"""Errors as answers: problem details (RFC 9457), one sentence each with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MEDIA_TYPE = "application/problem+json"


class ProblemDetails(BaseModel):
    """What every answer that is no success looks like."""

    type: str = Field("about:blank", description="Always about:blank: title and status say what kind it is.")
    title: str = Field(description="The phrase of the status code.")
    status: int = Field(description="The status code.")
    detail: str = Field(description="What was wrong: value, rule and remedy.")


class Problem(Exception):
    """A request that is refused: ``status`` code, one sentence, and headers such as Retry-After."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def answer(problem: Problem) -> JSONResponse:
    """Return the problem as a response."""
    content = ProblemDetails(title=HTTPStatus(problem.status).phrase, status=problem.status, detail=problem.detail)
    return JSONResponse(content.model_dump(), problem.status, problem.headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` in this form."""

    @app.exception_handler(Problem)
    async def refused(request: Request, error: Problem) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def no_such(request: Request, error: HTTPException) -> JSONResponse:
        details = {
            404: "there is nothing at this path; /openapi.json lists what there is",
            405: "this path does not take this method; the header Allow names those that it does",
        }
        return answer(Problem(error.status_code, details.get(error.status_code, str(error.detail)), error.headers))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(Problem(422, first_error(error.errors())))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(Problem(400, "the client went away before its request had arrived"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(Problem(500, "the server failed on this request; its log says why"))


def first_error(errors: Any) -> str:
    """Return the first of pydantic's ``errors`` as a sentence: where, the rule, what was given."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    message = str(first["msg"])
    given = repr(first.get("input"))
    shown = given if len(given) <= 60 else f"{given[:57]}..."
    return f"{where}: {message[0].lower()}{message[1:]}, got {shown}"
