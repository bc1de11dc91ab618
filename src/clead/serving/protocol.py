"""uvicorn's HTTP protocol with limits: on the head of a request, on time, and on connections."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clead.inference.problems import Problem, answer, raw
from clead.inference.settings import ServeSettings
from clead.serving.metrics import Metrics

MAX_ADDRESS = 8192
"""Bytes of a request's address with its query."""
MAX_HEADERS = 100
_EXCESS_SECONDS = 1.0  # in which a connection too many must send its request, to be told so
_LINGER_SECONDS = 2.0


def limited_protocol(settings: ServeSettings, metrics: Metrics) -> Any:
    """Return the protocol of a server with these settings, as uvicorn takes it."""
    return partial(_LimitedProtocol, settings, metrics)


class _LimitedProtocol(HttpToolsProtocol):
    """A connection within limits.

    uvicorn takes heads of any length, waits for ever for the first byte, for the rest of a head (a slow loris) and for a client
    that does not read, and counts connections only where a request has arrived.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings, self._metrics = settings, metrics
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._problem: Problem | None = None
        self._lingering = False
        self._in_head = self._began = False
        self._head_bytes = self._earlier_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        problem = self._too_many_connections()
        if problem is None:
            self._start_head_timer(self._settings.read_seconds)
            return
        self._metrics.connections.labels("too_many").inc()
        if len(self.connections) >= 2 * self._settings.max_connections:
            transport.abort()
            return

        async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
            self._metrics.requests.labels("other", str(problem.status)).inc()
            await answer(problem)(scope, receive, send)

        self.app: Any = refuse
        self._start_head_timer(min(_EXCESS_SECONDS, self._settings.read_seconds))

    def _too_many_connections(self) -> Problem | None:
        headers = {"Retry-After": "1", "Connection": "close"}
        total, most = self._settings.max_connections, self._settings.max_per_client
        if len(self.connections) >= total:
            text = f"the server has {total} open connections, which is its limit; come back in a second"
            return Problem(503, text, headers)
        connections: Any = self.connections
        addresses = [connection.client[0] for connection in connections if connection.client]
        if self.client and addresses.count(self.client[0]) > most:
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
            if self._earlier_bytes > self._settings.max_head:
                self._problem = self._head_too_large()
                self.send_400_response("")
                return
        if self.cycle is None or self.cycle.response_complete:  # a head that is not complete
            self._start_head_timer(self._settings.read_seconds)
        else:
            self._head_timer = _cancelled(self._head_timer)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._began = True
        self._head_bytes = self._earlier_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_ADDRESS:
            text = f"the address of a request may have {MAX_ADDRESS} bytes, got more; shorten it"
            self._refuse(Problem(414, text))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes + len(self.url) > self._settings.max_head or len(self.headers) >= MAX_HEADERS:
            self._refuse(self._head_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        cycle: Any = self.cycle
        cycle.transport = _GentleTransport(self)

    def _head_too_large(self) -> Problem:
        limits = f"{self._settings.max_head} bytes and {MAX_HEADERS} headers"
        return Problem(431, f"the head of a request may have {limits}, got more; send less")

    def _refuse(self, problem: Problem) -> None:
        self._problem = problem
        raise ValueError(problem.detail)  # the parser hands it to ``send_400_response``

    def send_400_response(self, msg: str) -> None:
        problem = self._problem or Problem(400, "this is no well-formed HTTP/1.1 request; correct it")
        self._metrics.connections.labels("malformed" if problem.status == 400 else "head_too_large").inc()
        self._metrics.requests.labels("other", str(problem.status)).inc()
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
        _cancelled(self._head_timer)
        self._head_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._settings.read_seconds, self._cut_off, "answer_not_read")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timer = _cancelled(self._write_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer, self._write_timer = _cancelled(self._head_timer), _cancelled(self._write_timer)
        super().connection_lost(exc)

    def _start_head_timer(self, seconds: float) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(seconds, self._cut_off, "slow_head")

    def _cut_off(self, reason: str) -> None:
        self._metrics.connections.labels(reason).inc()
        self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _GentleTransport:
    """A connection as a request's answer sees it: closed only when the rest of the request has come in."""

    def __init__(self, protocol: _LimitedProtocol) -> None:
        self._protocol, self._cycle = protocol, protocol.cycle
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing

    def close(self) -> None:
        """Close, at once if nothing more is to come."""
        if self._cycle.more_body and self._cycle.response_complete:
            self._protocol.linger()
        else:
            self._protocol.transport.close()
