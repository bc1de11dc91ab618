"""The datasets, one file each; ``DATASETS`` finds them by name, and ``READERS`` by what lies at a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clead.registry import Registry


@dataclass(frozen=True)
class Reader:
    """How one layout on a disk is read.

    Args:
        layout: the layout in one line, for messages and the docs, such as ``"train/CLASS/*.png"``.
        recognizes: says whether a path has this layout; looks at names and first bytes only, follows no link out of the path and
            never raises.
        read: path -> ``clead.data.base.Found``; raises UserError if the content is not as the layout says.
        rank: readers are asked in ascending order; a layout that another one would take for its own has the lower number.
    """

    layout: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], Any]
    rank: int = 50


DATASETS: Registry[Any] = Registry("dataset", "clead.data.datasets")
READERS: Registry[Reader] = Registry("layout", "clead.data.datasets")
