"""uvicorn around the application: the port first, then the models; slow clients are cut off; SIGTERM drains."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from clead.errors import UserError
from clead.serving.logs import log, log_as_json
from clead.serving.settings import ServeSettings


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to ``host`` and ``port``, 0 for any free one; raises UserError if that cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise UserError(
            f"--host {host}: {error.strerror or error}; give an address of this machine, such as 127.0.0.1"
        ) from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} of {host} is in use; give another one, or 0 for any free one") from None
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; give an address of this machine and a free port"
        ) from None
    return bound


def serve(
    make: Callable[[], FastAPI],
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the application that ``make`` returns until SIGINT or SIGTERM, then finish the requests in work.

    The port is taken before ``make`` is called, so that one in use is said before models are loaded.
    """
    bound = listen(host, port)
    try:
        app = make()
        log_as_json()
        config = uvicorn.Config(
            app,
            http=timed_protocol(settings.read_seconds),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=max(1, round(settings.read_seconds)),
            timeout_graceful_shutdown=settings.drain_seconds,
        )
        shown, taken = bound.getsockname()[:2]
        where = f"http://[{shown}]:{taken}" if ":" in shown else f"http://{shown}:{taken}"
        say(f"serving {', '.join(app.state.models)} at {where}; {where}/docs describes it; Ctrl-C stops it")
        log.info("listening", extra={"host": shown, "port": taken, "models": list(app.state.models)})
        with _stopped_quietly():
            uvicorn.Server(config).run(sockets=[bound])
    finally:
        bound.close()


def timed_protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with limits of its own: ``seconds`` for the head of a request, and for an answer to be taken.

    uvicorn waits for ever for the first byte, for the rest of a head (a slow loris) and for a client that does not read; only
    between requests does it have a limit.
    """
    base: Any = AutoHTTPProtocol  # one of two, by what is installed

    class Timed(base):
        _limit: asyncio.TimerHandle | None = None
        _taken: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            me: Any = self
            if me.cycle is None or me.cycle.response_complete:  # a head that is not complete
                self._begin()
            else:
                self._end()

        def pause_writing(self) -> None:
            super().pause_writing()
            me: Any = self
            self._taken = me.loop.call_later(seconds, me.transport.abort)

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

        def _begin(self) -> None:
            if self._limit is None:
                me: Any = self
                self._limit = me.loop.call_later(seconds, me.transport.abort)

        def _end(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return Timed


@contextmanager
def _stopped_quietly() -> Generator[None, None, None]:
    """Make uvicorn's end a normal one: after draining it raises the signal again, for whoever was there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
