"""Errors as answers: problem details (RFC 9457), one sentence each with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

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
    content = ProblemDetails(title=_phrase(problem.status), status=problem.status, detail=problem.detail)
    return JSONResponse(content.model_dump(), problem.status, problem.headers, MEDIA_TYPE)


DETAILS = {
    400: "the request is malformed; correct it",
    403: "this is not allowed",
    404: "there is nothing at this path; /openapi.json lists what there is",
    405: "this path does not take this method; the header Allow names those that it does",
    413: "the request is too large; send less",
    500: "the server failed on this request; its log says why",
}


def standard(status: int, headers: Mapping[str, str] | None = None) -> Problem:
    """Return the problem that says what a status code alone says."""
    return Problem(status, DETAILS.get(status, f"the server answers {_phrase(status)}"), headers)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def raw(problem: Problem) -> bytes:
    """Return the problem as the bytes of an HTTP/1.1 answer after which the connection is closed."""
    response = answer(problem)
    head = f"HTTP/1.1 {problem.status} {_phrase(problem.status)}\r\n".encode()
    headers = [*((k, v) for k, v in response.raw_headers if k != b"connection"), (b"connection", b"close")]
    return head + b"".join(name + b": " + value + b"\r\n" for name, value in headers) + b"\r\n" + bytes(response.body)


def first_error(errors: Any) -> str:
    """Return the first of pydantic's ``errors`` as a sentence: where, the rule, what was given."""
    first = errors[0]
    where = ".".join(str(step) for step in first["loc"]) or "body"
    message = str(first["msg"])
    given = repr(first.get("input"))
    shown = given if len(given) <= 60 else f"{given[:57]}..."
    return f"{where}: {message[0].lower()}{message[1:]}, got {shown}"
