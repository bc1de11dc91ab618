"""uvicorn around the application: the port first, then the models; slow clients are cut off; SIGTERM drains."""

from __future__ import annotations

import asyncio
import errno
import math
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from clead.errors import UserError
from clead.inference.hosts import hosts_of
from clead.inference.settings import ServeSettings
from clead.serving.logs import log, log_as_json
from clead.serving.protocol import limited_protocol


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to ``host`` and ``port``, 0 for any free one; raises UserError if that cannot be."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind)
    except OSError as error:
        text = f"--host {host}: {error.strerror or error}; give an address of this machine, such as 127.0.0.1"
        raise UserError(text) from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        text = f"--host {host} --port {port}: {error.strerror}; give an address of this machine and a free port"
        if error.errno == errno.EADDRINUSE:
            text = f"--port {port} of {host} is in use; give another one, or 0 for any free one"
        raise UserError(text) from None
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
        shown, taken = bound.getsockname()[:2]
        app.state.hosts = hosts_of(settings.allowed_hosts, host, shown)
        config = uvicorn.Config(
            app,
            http=limited_protocol(settings, app.state.metrics),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, round(settings.read_seconds)),
            timeout_graceful_shutdown=settings.drain_seconds,
        )
        where = f"http://[{shown}]:{taken}" if ":" in shown else f"http://{shown}:{taken}"
        say(f"serving {', '.join(app.state.models)} at {where}; {where}/docs describes it; Ctrl-C stops it")
        if app.state.hosts is None:
            say(
                "--allowed-hosts *: any name in Host and Origin is answered to, so pages from elsewhere can use this server"
            )
        with log_as_json():
            log.info("listening", extra={"host": shown, "port": taken, "models": list(app.state.models)})
            _Server(config).run(sockets=[bound])
    finally:
        bound.close()


class _Server(uvicorn.Server):
    """uvicorn's server; while it stops it tells new requests so until those in work are answered."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in work, within the configured time, and end."""
        app: Any = self.config.app
        app.state.draining = True
        seconds = self.config.timeout_graceful_shutdown or 0
        deadline = time.monotonic() + seconds
        log.info("draining", extra={"requests": len(self.server_state.tasks), "seconds": seconds})
        while self.server_state.tasks and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(deadline - time.monotonic()))
        await super().shutdown(sockets)
        self._captured_signals.clear()  # else uvicorn raises them again, for whoever was there before
