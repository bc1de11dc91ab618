"""The methods, one file each; ``METHODS`` finds them by name."""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

METHODS: Registry[Any] = Registry("method", "clead.methods", {"memory": "state"})
