"""The attacks, one file each; ``ATTACKS`` finds them by name."""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

ATTACKS: Registry[Any] = Registry("attack", "clead.attacks")
