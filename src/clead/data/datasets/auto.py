"""Your own images at a path, whatever their layout."""

from __future__ import annotations

import os
from pathlib import Path

from clead.data.base import Found, InMemoryDataset, existing
from clead.data.datasets import DATASETS, READERS, Reader
from clead.errors import UserError
from clead.settings import setting, settings


@DATASETS.register("auto")
@settings
class Auto(InMemoryDataset):
    """Images at a path: a folder of Parquet files, one with train/CLASS/ and test/CLASS/, or a .npz file."""

    path: Path = setting(..., "The folder or file; its content decides how it is read.")

    def read(self) -> Found:
        """Return what is there; raises UserError if nothing known is."""
        return read_any(self.path)


def read_any(path: Path, dataset: str | None = None) -> Found:
    """Read a path by its content: of the layouts that lie there, the one of ``dataset``, else the one of lowest rank.

    A note names the other layouts that lie there.
    """
    path = existing(path)
    candidates = [(name, reader) for name, reader in READERS.items() if recognizes(reader, path)]
    candidates.sort(key=lambda item: (dataset is not None and item[1].dataset != dataset, item[1].rank))
    if candidates:
        (_, reader), *others = candidates
        if dataset is not None and reader.dataset not in (None, dataset):
            raise UserError(
                f"data.path must hold {dataset}, got {str(path)!r}, which holds {reader.dataset}; give the path of {dataset}, "
                "or use --data.name auto"
            )
        found = reader.read(path)
        if beside := [other.layout for name, other in others if name not in reader.includes]:
            note = f"read as {reader.layout}; there also lies {' and '.join(beside)}, which is not read"
            found = found._replace(notes=(*found.notes, note))
        return found
    inside = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else []
    classes = path.is_dir() and any(entry.is_dir() for entry in path.iterdir())
    remedy = f"put a folder of images for each class into {path / 'train'}" if classes else "check --data.path"
    got = f"a folder with {', '.join(inside) or 'nothing'}" if path.is_dir() else "another kind of file"
    raise UserError(
        "data.path must be a folder with train-*.parquet and test-*.parquet, a folder with train/CLASS/, or "
        f"a .npz file, got {str(path)!r}, {got}; {remedy}"
    )


def recognizes(reader: Reader, path: Path) -> bool:
    """Say whether the path has the reader's layout; a folder that may not be looked into has none."""
    try:
        return reader.recognizes(path)
    except OSError:
        return False


def read_named(name: str, path: Path | None, classes: int) -> Found | None:
    """Read the path, else ``$CLEAD_DATA/name``, checking the number of classes; None if neither is there."""
    data = os.environ.get("CLEAD_DATA")
    if path is None and data and (Path(data).expanduser() / name).exists():
        path = Path(data) / name
    if path is None:
        return None
    found = read_any(path, name)
    if len(found.classes) != classes:
        raise UserError(
            f"{name} has {classes} classes, got {len(found.classes)} at {str(path)!r}; use --data.name auto "
            "for other data"
        )
    return found
