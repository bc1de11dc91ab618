"""The command line: one file per command; ``clead --help`` shows them in this order."""

from __future__ import annotations

from importlib import import_module

from clead.cli.app import main

__all__ = ["main"]

for _command in (
    "data",
    "train",
    "harden",
    "tune",
    "evaluate",
    "attack",
    "measure",
    "compare",
    "report",
    "export",
    "serve",
    "playground",
    "demo",
    "list",
):
    import_module(f"clead.cli.{_command}")
