"""The names of a model's classes, in whatever form the model or its file states them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 4_000_000
"""Characters of a text that is parsed; ImageNet-21k's names are 500,000."""
_MOST = 200_000
KEYS = ("id2label", "classes", "class_names", "class_to_idx", "label_names", "labels", "names", "idx_to_class")
"""What libraries call the names: transformers, clead, torchvision, timm, YOLO and others."""


def class_names(value: Any) -> tuple[str, ...] | None:
    """Return the names of classes 0 … K - 1, or None if ``value`` does not state them.

    Args:
        value: a list of names, a map from class to name, or from name to class; or any of them as JSON, or as Python writes
            it (YOLO's ``names``), or names between commas or line breaks.

    >>> class_names({"1": "dog", "0": "cat"}), class_names({"cat": 0, "dog": 1}), class_names("{0: 'cat', 1: 'dog'}")
    (('cat', 'dog'), ('cat', 'dog'), ('cat', 'dog'))
    >>> class_names({0: "LABEL_0", 1: "LABEL_1"}) is None  # transformers' own, which says nothing
    True
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping) and len(value) <= _MOST:
        value = _in_order(value)
    if isinstance(value, str) or not isinstance(value, Sequence) or not 2 <= len(value) <= _MOST:
        return None
    if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in value):
        return None
    names = tuple(str(name) for name in value)
    if all(name == f"LABEL_{k}" for k, name in enumerate(names)) or len(set(names)) < len(names):
        return None
    return names


def names_in(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of classes that ``metadata`` states under one of the usual keys, or None."""
    for key in KEYS:
        if key in metadata and (names := class_names(metadata[key])) is not None:
            return names
    return None


def _parsed(text: str) -> Any:
    if len(text) > _LONGEST:
        return None
    start = text.lstrip()[:1]
    if start and start in "[{(":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return [name.strip() for name in re.split(r"\n" if "\n" in text.strip() else r",", text.strip())]


def _in_order(mapping: Mapping[Any, Any]) -> list[Any] | None:
    """Return the names of a map from class to name, or from name to class."""
    for pairs in (mapping.items(), [(k, name) for name, k in mapping.items()]):
        numbers = [int(k) for k, _ in pairs if isinstance(k, int) or (isinstance(k, str) and k.isdecimal())]
        if sorted(numbers) == list(range(len(mapping))):
            return [name for _, name in sorted((int(k), name) for k, name in pairs)]
    return None
