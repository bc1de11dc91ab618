"""Name -> class, filled by a decorator; a folder's files are imported on the first look-up, so there is no list to edit.

A new attack, loss, method, model or dataset is one new file in its folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from clead.errors import UserError, did_you_mean
from clead.renamed import keep_old_methods

T = TypeVar("T")


class Registry(Generic[T]):
    """The named things of one folder.

    Args:
        kind: what an entry is called in messages, such as ``"attack"``.
        package: the package whose modules register entries, such as ``"clead.attacks"``.
        renamed: methods of its classes that had another name: old name → new name.
    """

    def __init__(self, kind: str, package: str, renamed: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.renamed = renamed or {}
        self.package = package
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``; raises ValueError on a duplicate."""

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]!r} and {entry!r}")
            keep_old_methods(entry, self.renamed)
            self._entries[name] = entry
            return entry

        return decorate

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Return the entry called ``name``; raises UserError with suggestions if there is none."""
        self._discover()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def items(self) -> list[tuple[str, T]]:
        """Return (name, entry) pairs, sorted by name."""
        return [(name, self._entries[name]) for name in self.names()]

    def _discover(self) -> None:
        if not self._discovered:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._discovered = True
