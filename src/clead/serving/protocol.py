"""uvicorn's HTTP protocol with limits: on the head of a request, on time, and on connections."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clead.inference.problems import Problem, answer, raw
from clead.inference.settings import ServeSettings
from clead.serving.metrics import Metrics

LONGEST_LINE = 8192
"""Bytes of a request's address with its query."""
MOST_HEADERS = 100
_EXCESS_SECONDS = 1.0  # in which a connection too many must send its request, to be told so
_LINGER_SECONDS = 2.0


def limited_protocol(settings: ServeSettings, metrics: Metrics) -> type[asyncio.Protocol]:
    """Return the protocol of a server with these settings.

    uvicorn takes heads of any length, waits for ever for the first byte, for the rest of a head (a slow loris) and for a client
    that does not read, and counts connections only where a request has arrived.
    """

    class Limited(HttpToolsProtocol):
        _limit: asyncio.TimerHandle | None = None
        _taken: asyncio.TimerHandle | None = None
        _problem: Problem | None = None
        _lingering = False
        _in_head = False
        _began = False
        _head_bytes = 0
        _earlier_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            excess = self._excess()
            if excess is None:
                self._begin(settings.read_seconds)
                return
            metrics.connections.labels("too_many").inc()
            if len(self.connections) >= 2 * settings.max_connections:
                transport.abort()
                return

            async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
                metrics.requests.labels("other", str(excess.status)).inc()
                await answer(excess)(scope, receive, send)

            self.app: Any = refuse
            self._begin(min(_EXCESS_SECONDS, settings.read_seconds))

        def _excess(self) -> Problem | None:
            """Say whether this connection is one too many."""
            headers = {"Retry-After": "1", "Connection": "close"}
            if len(self.connections) >= settings.max_connections:
                text = f"the server has {settings.max_connections} open connections, which is its limit; come back in a second"
                return Problem(503, text, headers)
            client = self.client[0] if self.client else None
            most = settings.max_per_client
            connections: Any = self.connections
            if client is not None and sum(c.client is not None and c.client[0] == client for c in connections) > most:
                text = f"at most {most} connections may be open from one address; close some, or ask for a higher --max-per-client"
                return Problem(429, text, headers)
            return None

        def data_received(self, data: bytes) -> None:
            if self._lingering:
                return
            self._began = False
            super().data_received(data)
            if self._lingering or self.transport.is_closing():
                return
            if self._in_head and not self._began:  # a head that has been coming for more than one packet
                self._earlier_bytes += len(data)
                if self._earlier_bytes > settings.max_head:
                    self._problem = self._too_large()
                    self.send_400_response("")
                    return
            if self.cycle is None or self.cycle.response_complete:  # a head that is not complete
                self._begin(settings.read_seconds)
            else:
                self._end()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = self._began = True
            self._head_bytes = self._earlier_bytes = 0

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            if len(self.url) > LONGEST_LINE:
                text = f"the address of a request may have {LONGEST_LINE} bytes, got more; shorten it"
                self._refuse(Problem(414, text))

        def on_header(self, name: bytes, value: bytes) -> None:
            self._head_bytes += len(name) + len(value) + 4
            if self._head_bytes + len(self.url) > settings.max_head or len(self.headers) >= MOST_HEADERS:
                self._refuse(self._too_large())
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()
            cycle: Any = self.cycle
            cycle.transport = _Gentle(self)

        def _too_large(self) -> Problem:
            return Problem(
                431,
                f"the head of a request may have {settings.max_head} bytes and {MOST_HEADERS} headers, got more; send less",
            )

        def _refuse(self, problem: Problem) -> None:
            self._problem = problem
            raise ValueError(problem.detail)  # the parser hands it to ``send_400_response``

        def send_400_response(self, msg: str) -> None:
            problem = self._problem or Problem(400, "this is no well-formed HTTP/1.1 request; correct it")
            reason = {414: "head_too_large", 431: "head_too_large"}.get(problem.status, "malformed")
            metrics.connections.labels(reason).inc()
            metrics.requests.labels("other", str(problem.status)).inc()
            cycle = self.cycle
            waits = cycle is not None and not cycle.response_started and not self.pipeline
            if cycle is None or cycle.response_complete or waits:
                self.transport.write(raw(problem))
            if waits:  # for the rest of a body that is broken
                cycle.disconnected = True
                cycle.message_event.set()
            self.linger()

        def linger(self) -> None:
            """End the connection so that the answer arrives: closing it at once while bytes come in would take the answer back."""
            if self._lingering or self.transport.is_closing():
                return
            self._lingering = True
            self.pipeline.clear()
            self._end()
            self._limit = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.flow.resume_reading()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taken = self.loop.call_later(settings.read_seconds, self._cut_off, "answer_not_read")

        def resume_writing(self) -> None:
            super().resume_writing()
            self._taken_up()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            self._taken_up()
            super().connection_lost(exc)

        def _taken_up(self) -> None:
            if self._taken is not None:
                self._taken.cancel()
                self._taken = None

        def _begin(self, seconds: float) -> None:
            if self._limit is None:
                self._limit = self.loop.call_later(seconds, self._cut_off, "slow_head")

        def _end(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _cut_off(self, reason: str) -> None:
            metrics.connections.labels(reason).inc()
            self.transport.abort()

    return Limited


class _Gentle:
    """A connection as a request's answer sees it: closed only when the rest of the request has come in."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._transport = protocol.transport
        self._cycle = protocol.cycle
        self.write = self._transport.write
        self.is_closing = self._transport.is_closing

    def close(self) -> None:
        """Close, at once if nothing more is to come."""
        if self._cycle.more_body and self._cycle.response_complete:
            self._protocol.linger()
        else:
            self._transport.close()
