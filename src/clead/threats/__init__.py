"""The threats, one file each; ``THREATS`` finds them by name."""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

THREATS: Registry[Any] = Registry("threat", "clead.threats", {"size": "distance"})
