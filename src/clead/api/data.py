"""Look at a data set before anything is trained or evaluated on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clead.atomic_io import write_atomically
from clead.data.datasets import DATASETS
from clead.data.inspection import DataReport, inspect
from clead.settings import validated


def inspect_data(path: str | Path | Any, *, show: str | Path | None = None, **settings: Any) -> DataReport:
    """Return what a data set holds: splits, sizes, classes, files left out, images that are there twice.

    It reads data that training would refuse, too, and says why it would.

    Args:
        path: a folder or file, or the settings of a data set (``config.data``).
        show: write a contact sheet to this PNG file.
        **settings: keys of the ``data`` group, such as ``name="cifar10"``, ``group_by="scene[0-9]+"``.

    Raises UserError if nothing can be read.

    >>> inspect_data("photos")
    Traceback (most recent call last):
        ...
    clead.errors.UserError: data.path must exist, got 'photos'; ...
    """
    data: Any = path
    if isinstance(path, (str, Path)):
        data = validated(DATASETS.get(settings.pop("name", "auto")), {"path": path, **settings}, "data")
    report, sheet = inspect(data)
    if show is not None:
        write_atomically(Path(show), sheet)
    return report
