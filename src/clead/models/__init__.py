"""The models, one file each; ``MODELS`` finds them by name."""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

MODELS: Registry[Any] = Registry("model", "clead.models")
LIBRARIES = ("timm", "torchvision", "hf")


def is_library(name: str) -> bool:
    """Say whether ``name`` names a network of a library, such as ``timm:resnet18``."""
    library, colon, _ = name.partition(":")
    return bool(colon) and library in LIBRARIES
