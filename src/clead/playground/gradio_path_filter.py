"""Only those of gradio's paths that the page needs, only files that were uploaded, and only so much of them.

gradio can read files from addresses, forward requests to others, and edit apps; a playground needs none of it. And an event may
name a file by its path or address: gradio 6.31 checks paths only if the page was launched, which one that is mounted in another
application never is, and fetches what stands at an address in any case.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clead.inference.problems import Problem, answer
from clead.inference.request_parsing import Buffers, read_body
from clead.inference.settings import ServeSettings

MAX_EVENT = 256 * 1024
"""Bytes of an event: settings and names of uploaded files, never an image itself."""
MAX_UPLOADS = 128 * 2**20
"""Bytes of all uploaded files together; the oldest go when another one comes."""
UPLOAD_SECONDS = 600.0
"""So long an uploaded file stays at most; the page reads it in the moment it has arrived."""

_GET = re.compile(
    r"/?$|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?$|/(static|assets|svelte)/"
    r"|/gradio_api/(info|queue/data|queue/status|startup-events|upload_progress|app_id|heartbeat/[^/]+)/?$"
)
_POST = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?$")


class Uploads:
    """The files that visitors have uploaded: the oldest are removed once they are ``limit`` bytes, or ``seconds`` old."""

    def __init__(self, limit: int = MAX_UPLOADS, seconds: float = UPLOAD_SECONDS) -> None:
        self.limit, self.seconds = limit, seconds
        self.files: dict[str, tuple[float, int]] = {}  # path → when it came, bytes; the oldest first

    def make_room(self, size: int = 0) -> None:
        """Remove files until ``size`` more bytes have room."""
        total = size + sum(bytes_ for _, bytes_ in self.files.values())
        for path, (since, bytes_) in list(self.files.items()):
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
        max_upload: bytes of an uploaded file.
        settings: limits of the server on time and on what is in memory.
    """

    def __init__(
        self, app: ASGIApp, path: str, files: str, max_upload: int, settings: ServeSettings | None = None
    ) -> None:
        self.app, self.path, self.max_upload = app, path, max_upload
        self.files = files.rstrip("/") + "/"
        self.settings = settings or ServeSettings()
        self.buffers = Buffers(self.settings.max_buffered)
        self.uploads = Uploads()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith(f"{self.path}/"):
            await self.app(scope, receive, send)
            return
        inside, method = scope["path"].removeprefix(self.path), scope["method"]
        self.uploads.make_room()
        try:
            if method in ("GET", "HEAD"):
                if not _GET.match(inside) and not self._is_upload(inside.removeprefix("/gradio_api/file=")):
                    raise Problem(404, "the playground has no such path")
                await self.app(scope, receive, send)
            elif method == "POST" and _POST.match(inside):
                await self._post(inside.startswith("/gradio_api/upload"), Request(scope, receive), send)
            else:
                raise Problem(404, "the playground has no such path")
        except Problem as problem:
            await answer(problem)(scope, receive, send)

    async def _post(self, upload: bool, request: Request, send: Send) -> None:
        """Pass on a file, or an event."""
        # A form adds a few hundred bytes to its file; gradio itself holds the file to its limit.
        limit = self.max_upload + 4096 if upload else MAX_EVENT
        async with read_body(request, self.settings, self.buffers, limit) as body:
            if upload:
                await self._upload(request, body, send)
            else:
                await self.app(request.scope, _replay(self._checked(body), request.receive), send)

    async def _upload(self, request: Request, body: bytes, send: Send) -> None:
        """Pass on a form with one file, and remember what gradio made of it."""
        boundary = parse_options_header(request.headers.get("content-type"))[1].get(b"boundary")
        if boundary and body.count(b"--" + boundary) > 2:
            raise Problem(422, "one file is taken at a time, got several; upload them one by one")
        self.uploads.make_room(len(body))
        response = bytearray()

        async def copied(message: Message) -> None:
            response.extend(message.get("body", b""))
            await send(message)

        try:
            await self.app(request.scope, _replay(body, request.receive), copied)
        finally:
            with suppress(ValueError, TypeError):  # an error, no list of paths
                for path in json.loads(response):
                    if isinstance(path, str) and self._is_upload(path):
                        self.uploads.add(path, len(body))

    def _checked(self, body: bytes) -> bytes:
        """Return an event that names no file but an uploaded one."""

        def with_uploads_only(content: dict[str, Any]) -> dict[str, Any]:
            if isinstance(path := content.get("path"), str) and not self._is_upload(path):
                raise ValueError(path)
            return content

        try:
            content = json.loads(body or b"{}", object_hook=with_uploads_only)
        except (ValueError, RecursionError):
            text = "events name no file but an uploaded one, and no address; upload the image itself"
            raise Problem(400, text) from None
        # As it was read here, so that nothing reads it otherwise, such as a key that is there twice.
        return json.dumps(content).encode()

    def _is_upload(self, path: str) -> bool:
        """Say whether a path is in gradio's own folder."""
        return path.startswith(self.files) and ".." not in path


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` once, and after it what the connection gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
