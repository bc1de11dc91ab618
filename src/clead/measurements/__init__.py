"""What can be measured besides robust accuracy: one file or folder each, with its settings, its computation and its section.

A new measurement is one new file here and one test: the command, ``clead.measure``, the JSON file, resuming after a kill, the
report's section and the reference page come from its class. ``base.py`` says what such a class must have.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from clead.registry import Registry

MEASUREMENTS: Registry[Any] = Registry("measurement", "clead.measurements")


def catalogue() -> dict[str, str]:
    """Return name -> first paragraph of the docstring of each measurement, from the source: nothing imports PyTorch."""
    entries = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text = path.read_text()
        if "@MEASUREMENTS.register(" not in text or path == Path(__file__):
            continue
        for node in ast.parse(text).body:
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "MEASUREMENTS.register":
                    about = ast.get_docstring(node) or ""  # ty: ignore[invalid-argument-type]
                    entries[ast.literal_eval(decorator.args[0])] = about.split("\n\n")[0].replace("``", "")
    return dict(sorted(entries.items()))
