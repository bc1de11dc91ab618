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
        read: path -> ``clead.data.base.RawSplits``; raises UserError if the content is not as the layout says.
        rank: readers are asked in ascending order; a layout that another one would take for its own has the lower number.
        dataset: the data set that only this layout holds, such as ``"cifar10"``; asked for by name, its readers come first.
        includes: the layouts that recognize the same files, of which this one is a special case.
    """

    layout: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], Any]
    rank: int = 50
    dataset: str | None = None
    includes: tuple[str, ...] = ()


DATASETS: Registry[Any] = Registry("dataset", "clead.data.datasets")
READERS: Registry[Reader] = Registry("layout", "clead.data.datasets")
