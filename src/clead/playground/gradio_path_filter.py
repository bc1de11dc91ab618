"""Only those of gradio's paths that the page needs, only files that were uploaded, and only so much of them.

gradio can read files from addresses, forward requests to others, and edit apps; a playground needs none of it. And an event may
name a file by its path: gradio 6.31, mounted in another application, copies any file of the machine that an event names to where
it can be fetched (its check asks whether the page was launched, which a mounted one never is).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clead.inference.problems import Problem, answer
from clead.inference.request_parsing import Buffers, read_body
from clead.inference.settings import ServeSettings

MAX_EVENT = 256 * 1024
"""Bytes of an event: settings and names of uploaded files, never an image itself."""

_GET = re.compile(
    r"/?$|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?$|/(static|assets|svelte)/"
    r"|/gradio_api/(info|queue/data|queue/status|startup-events|upload_progress|app_id|heartbeat/[^/]+)/?$"
)
_POST = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?$")


MAX_UPLOADS = 128 * 2**20
"""Bytes of all uploaded files together; the oldest go when another one comes."""
UPLOAD_SECONDS = 600.0
"""So long an uploaded file stays at most; the page reads it in the moment it has arrived."""


class Uploads:
    """The files that visitors have uploaded: the oldest are removed once they are ``limit`` bytes, or ``seconds`` old."""

    def __init__(self, limit: int = MAX_UPLOADS, seconds: float = UPLOAD_SECONDS) -> None:
        self.limit, self.seconds = limit, seconds
        self.files: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def make_room(self, size: int = 0) -> None:
        """Remove files until ``size`` more bytes have room."""
        total = size + sum(bytes_ for _, bytes_ in self.files.values())
        while self.files:
            path, (since, bytes_) = next(iter(self.files.items()))
            if total <= self.limit and time.monotonic() - since <= self.seconds:
                return
            del self.files[path]
            total -= bytes_
            with suppress(OSError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))

    def add(self, path: str, size: int) -> None:
        """Count a file; one of the same content has the same path."""
        self.files.pop(path, None)
        self.files[path] = time.monotonic(), size


class GradioPathFilter:
    """ASGI middleware: under ``path`` only what the page needs, elsewhere everything.

    Args:
        app: the application.
        path: where gradio is mounted.
        files: gradio's own folder; no file outside of it is given out.
        largest_upload: bytes of an uploaded file.
        settings: limits of the server on time and on what is in memory.
    """

    def __init__(
        self, app: ASGIApp, path: str, files: str, largest_upload: int, settings: ServeSettings | None = None
    ) -> None:
        self.app = app
        self.path = path
        self.files = files.rstrip("/") + "/"
        self.largest_upload = largest_upload
        self.settings = settings or ServeSettings()
        self.buffers = Buffers(self.settings.max_buffered)
        self.uploads = Uploads()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith(f"{self.path}/"):
            await self.app(scope, receive, send)
            return
        inside, method = scope["path"].removeprefix(self.path), scope["method"]
        reads = method in ("GET", "HEAD")
        file = reads and self._ours(inside.removeprefix("/gradio_api/file="))
        self.uploads.make_room()
        try:
            if not file and (not reads and method != "POST" or not (_GET if reads else _POST).match(inside)):
                raise Problem(404, "the playground has no such path")
            if reads:
                await self.app(scope, receive, send)
                return
            upload = inside.startswith("/gradio_api/upload")
            # A form adds a few hundred bytes to its file; gradio itself holds the file to its limit.
            limit = self.largest_upload + 4096 if upload else MAX_EVENT
            request = Request(scope, receive)
            async with read_body(request, self.settings, self.buffers, limit) as body:
                if upload:
                    await self._uploaded(scope, body, receive, send)
                else:
                    await self.app(scope, _again(self._checked(body), receive), send)
        except Problem as problem:
            await answer(problem)(scope, receive, send)

    async def _uploaded(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Pass on a form with one file, and remember what gradio made of it."""
        _, options = parse_options_header(Headers(scope=scope).get("content-type"))
        boundary = options.get(b"boundary")
        if boundary and body.count(b"--" + boundary) > 2:
            raise Problem(422, "one file is taken at a time, got several; upload them one by one")
        self.uploads.make_room(len(body))
        response = bytearray()

        async def listened(message: Message) -> None:
            response.extend(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, _again(body, receive), listened)
        finally:
            with suppress(ValueError, TypeError):  # an error, no list of paths
                for path in json.loads(response):
                    if isinstance(path, str) and self._ours(path):
                        self.uploads.add(path, len(body))

    def _checked(self, body: bytes) -> bytes:
        """Return an event that names no file but an uploaded one."""
        try:
            content = json.loads(body or b"{}")
            right = all(map(self._ours, _paths(content)))
        except (ValueError, RecursionError):
            right = False
        if not right:
            raise Problem(400, "events name no file but an uploaded one, and no address; upload the image itself")
        # As it was read here, so that nothing reads it otherwise, such as a key that is there twice.
        return json.dumps(content).encode()

    def _ours(self, path: str) -> bool:
        """Say whether a path is in gradio's own folder."""
        return path.startswith(self.files) and ".." not in path


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` once, and after it what the connection gives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _paths(value: Any) -> Iterator[str]:
    """Yield what the parts of a JSON value name as a file's path."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for part in value.values():
            yield from _paths(part)
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part)
