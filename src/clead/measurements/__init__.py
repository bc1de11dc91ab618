"""What can be measured besides robust accuracy: one file or folder each, with its settings, its computation and its section.

A new measurement is one new file here and one test: the command, ``clead.measure``, the JSON file, resuming after a kill, the
report's section and the reference page come from its class. ``base.py`` says what such a class must have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clead.registry import Registry

MEASUREMENTS: Registry[Any] = Registry("measurement", "clead.measurements")


_ENTRY = re.compile(
    r'^@MEASUREMENTS\.register\("([\w-]+)"\)\n(?:@\w+\n)*class [^\n]*:\n    """(.*?)(?:\n\n|""")', re.M | re.S
)


def catalogue() -> dict[str, str]:
    """Return name -> first paragraph of the docstring of each measurement, from the source: nothing imports PyTorch."""
    sources = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("*.py"))
    entries = (match for source in sources for match in _ENTRY.findall(source))
    return dict(sorted((name, " ".join(about.replace("``", "").split())) for name, about in entries))
