"""Only those of gradio's paths that the page needs, and only files that were uploaded.

gradio can read files from addresses, forward requests to others, and edit apps; a playground needs none of it. And an event may
name a file by its path: gradio 6.31, mounted in another application, copies any file of the machine that an event names to where
it can be fetched (its check asks whether the page was launched, which a mounted one never is).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_EVENT = 256 * 1024
"""Bytes of an event: settings and names of uploaded files, never an image itself."""

_GET = re.compile(
    r"/?$|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?$|/(static|assets|svelte)/"
    r"|/gradio_api/(info|queue/data|queue/status|startup-events|upload_progress|app_id|heartbeat/[^/]+)/?$"
)
_POST = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?$")


class Fence:
    """ASGI middleware: under ``path`` only what the page needs, elsewhere everything.

    Args:
        app: the application.
        path: where gradio is mounted.
        files: gradio's own folder; no file outside of it is given out.
        largest_upload: bytes of an uploaded file.
    """

    def __init__(self, app: ASGIApp, path: str, files: str, largest_upload: int) -> None:
        self.app = app
        self.path = path
        self.files = files.rstrip("/") + "/"
        self.largest_upload = largest_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith(f"{self.path}/"):
            await self.app(scope, receive, send)
            return
        inside = scope["path"].removeprefix(self.path)
        pattern = _GET if scope["method"] in ("GET", "HEAD") else _POST
        file = scope["method"] in ("GET", "HEAD") and self._ours(inside.removeprefix("/gradio_api/file="))
        if not file and (scope["method"] not in ("GET", "HEAD", "POST") or not pattern.match(inside)):
            await PlainTextResponse("the playground has no such path", 404)(scope, receive, send)
            return
        if scope["method"] == "POST":
            # A form adds a few hundred bytes to its file; gradio itself holds the file to its limit.
            upload = inside.startswith("/gradio_api/upload")
            body = await _body(receive, self.largest_upload + 4096 if upload else LARGEST_EVENT)
            if body is None:
                limit = f"{self.largest_upload // 2**20} MiB" if upload else f"{LARGEST_EVENT // 1024} KiB"
                await PlainTextResponse(f"at most {limit} are read; send less", 413)(scope, receive, send)
                return
            if not upload:
                try:
                    content = json.loads(body or b"{}")
                    right = all(map(self._ours, _paths(content)))
                    # As it was read here, so that nothing reads it otherwise, such as a key that is there twice.
                    body = json.dumps(content).encode()
                except (ValueError, RecursionError):
                    right = False
                if not right:
                    text = "events name no file but an uploaded one, and no address; upload the image itself"
                    await PlainTextResponse(text, 400)(scope, receive, send)
                    return
            receive = _again(body, receive)
        await self.app(scope, receive, send)

    def _ours(self, path: str) -> bool:
        """Say whether a path is in gradio's own folder."""
        return path.startswith(self.files) and ".." not in path


async def _body(receive: Receive, limit: int) -> bytes | None:
    """Return the body, or None if it is longer than ``limit``."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


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
