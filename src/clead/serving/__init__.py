"""Serving: runs answer over HTTP, within stated limits; ``create_app`` makes the application, ``serve`` runs it."""

from __future__ import annotations

from clead.inference.settings import ServeSettings
from clead.serving.app import create_app
from clead.serving.server import serve

__all__ = ["ServeSettings", "create_app", "serve"]
