"""What every request passes first: the API key, the number of requests at once; and last: metrics and a log line."""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clead.serving.logs import log
from clead.serving.metrics import Metrics
from clead.serving.problems import Problem, answer
from clead.serving.settings import ServeSettings

OPEN = frozenset({"/healthz", "/openapi.json", "/docs", "/redoc"})
"""Paths that need no API key, with what /docs and /redoc load; they say nothing about a model but its classes."""
ASSETS = "/static-offline-docs/"
LIMITED = "/v1/"
_NAMED = frozenset({*OPEN, "/metrics", "/v1/predict", "/v1/explain"})


class Gate:
    """ASGI middleware around ``app``."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.key = None if settings.api_key is None else settings.api_key.get_secret_value().encode()
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, path = time.perf_counter(), 500, scope["path"]

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        limited = path.startswith(LIMITED)
        refusal = self._refusal(scope, path, limited)
        limited = limited and refusal is None  # what is refused takes nobody's place
        self.in_flight += limited
        try:
            if refusal is not None:
                self.metrics.refused.labels(str(refusal.status)).inc()
                await answer(refusal)(scope, receive, watched)
            else:
                if limited:
                    self.metrics.in_flight.inc()
                try:
                    await self.app(scope, receive, watched)
                finally:
                    if limited:
                        self.metrics.in_flight.dec()
        finally:
            self.in_flight -= limited
            seconds = time.perf_counter() - start
            label = path if path in _NAMED else "other"
            self.metrics.requests.labels(label, str(status)).inc()
            self.metrics.seconds.labels(label).observe(seconds)
            client = scope.get("client")
            fields: dict[str, Any] = {
                "method": scope["method"],
                "path": path,
                "status": status,
                "milliseconds": round(1000 * seconds, 2),
                "client": client[0] if client else None,
            }
            log.info("request", extra=fields)

    def _refusal(self, scope: Scope, path: str, limited: bool) -> Problem | None:
        if self.key is not None and path not in OPEN and not path.startswith(ASSETS):
            headers = Headers(scope=scope)
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode("latin-1"), self.key):
                return Problem(
                    401,
                    "API key: missing or wrong; send it as X-API-Key or as Authorization: Bearer",
                    {"WWW-Authenticate": "Bearer"},
                )
        if limited and self.in_flight >= self.settings.max_requests:
            return Problem(
                503,
                f"the server works on {self.settings.max_requests} requests already, which is its limit; come back in a second",
                {"Retry-After": "1", "Connection": "close"},
            )
        return None
