"""Serving: runs answer over HTTP, within stated limits; ``create_app`` makes the application, ``serve`` runs it."""

from __future__ import annotations

from clead.serving.app import create_app
from clead.serving.server import serve
from clead.serving.settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "serve"]
