"""What every request passes first: the server's name, the API key; and last: metrics and a log line."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clead.inference.problems import MEDIA_TYPE, Problem, answer, standard
from clead.inference.settings import ServeSettings
from clead.serving.logs import log
from clead.serving.metrics import Metrics

HEALTH = frozenset({"/healthz", "/readyz"})
OPEN = frozenset({*HEALTH, "/openapi.json", "/docs", "/redoc"})
"""Paths that need no API key, with what /docs and /redoc load; they say nothing about a model but its classes."""
ASSETS = "/static-offline-docs/"
_NAMED = frozenset({*OPEN, "/metrics", "/v1/predict", "/v1/explain", "/v1/search"})
_MAX_LOGGED = 300  # characters of a path


class Gate:
    """ASGI middleware around ``app``; ``app.state.hosts`` says which names it answers to, ``app.state.draining`` that it ends."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self.key = None if settings.api_key is None else settings.api_key.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it; there are no websockets."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return
        start, path = time.perf_counter(), scope["path"]
        response = _Response(scope, send)
        try:
            if (problem := self._problem(scope, path)) is None:
                await self._inside(scope, receive, response)
            else:
                self.metrics.refused.labels(str(problem.status)).inc()
                await answer(problem)(scope, receive, response)
        finally:
            self._log(scope, path, response.status, time.perf_counter() - start)

    async def _inside(self, scope: Scope, receive: Receive, response: _Response) -> None:
        if scope["method"] == "HEAD" and (scope["path"] in _NAMED or scope["path"].startswith(ASSETS)):
            scope = {**scope, "method": "GET"}  # the same head; ``response`` leaves the body out
        try:
            await self.app(scope, receive, response)
        except asyncio.CancelledError:  # the server's time for finishing is over
            if response.started:
                raise
            problem = Problem(503, "the server stopped before this was answered; come back later", {"Retry-After": "5"})
            await answer(problem)(scope, receive, response)

    def _log(self, scope: Scope, path: str, status: int, seconds: float) -> None:
        label = path if path in _NAMED else "other"
        self.metrics.requests.labels(label, str(status)).inc()
        self.metrics.seconds.labels(label).observe(seconds)
        client = scope["client"][0] if scope.get("client") else None
        fields = {"method": scope["method"], "path": path[:_MAX_LOGGED], "status": status}
        log.info("request", extra={**fields, "milliseconds": round(1000 * seconds, 2), "client": client})

    def _problem(self, scope: Scope, path: str) -> Problem | None:
        """Return why a request is refused before it is looked at, or None."""
        state = scope["app"].state
        if state.hosts is not None and (problem := state.hosts.refusal(scope)) is not None:
            return problem
        if self.key is not None and path not in OPEN and not path.startswith(ASSETS):
            headers = Headers(scope=scope)
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode("latin-1"), self.key):
                text = "API key: missing or wrong; send it as X-API-Key or as Authorization: Bearer"
                return Problem(401, text, {"WWW-Authenticate": "Bearer"})
        if state.draining and path not in HEALTH:
            text = "the server is stopping and takes no new requests; come back in a few seconds"
            return Problem(503, text, {"Retry-After": "5", "Connection": "close"})
        return None


class _Response:
    """``send`` that remembers the status, leaves out bodies that HEAD must not have, and makes every error a problem."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.send, self.head = send, scope["method"] == "HEAD"
        self.status, self.started = 500, False
        self.replaced: Message | None = None  # the start of an answer that is made a problem
        self.done = False

    async def __call__(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            if self.status >= 400 and not kind.startswith(MEDIA_TYPE):
                self.replaced = message
                return
        elif message["type"] == "http.response.body":
            if self.replaced is not None:
                await self._replace(self.replaced, message.get("body", b""))
                return
            if self.head:
                message = {**message, "body": b""}
        await self.send(message)

    async def _replace(self, start: Message, body: bytes) -> None:
        """Answer with a problem instead; what a FastAPI application says in one sentence stays."""
        if self.done:
            return
        self.done = True
        headers = Headers(raw=start.get("headers", []))
        problem = standard(self.status, {k: v for k, v in headers.items() if k in ("allow", "retry-after")})
        with suppress(ValueError, TypeError, KeyError):
            detail = json.loads(body)["detail"] if headers.get("content-type") == "application/json" else None
            if isinstance(detail, str) and detail.isprintable() and len(detail) <= _MAX_LOGGED:
                problem.detail = detail
        response = answer(problem)
        await self.send({**start, "headers": response.raw_headers})
        await self.send({"type": "http.response.body", "body": b"" if self.head else bytes(response.body)})
