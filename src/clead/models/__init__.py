"""The models, one file each; ``MODELS`` finds them by name."""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

MODELS: Registry[Any] = Registry("model", "clead.models")
