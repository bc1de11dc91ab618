"""Every plot of a report as files: PNG, SVG, and its numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from clead.atomic_io import JSON_LIMIT, read_regular, write_atomically
from clead.errors import UserError
from clead.output import csv_text
from clead.results.figure import Drawing

INDEX = "index.csv"
"""What is in the folder: the name of each figure, and what it shows. Only files that it names are ever removed."""

SUFFIXES = (".png", ".svg", ".csv")


def write_figures(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Write each drawing as ``NAME.png``, ``NAME.svg`` and ``NAME.csv`` into ``folder``, with an index; return the paths.

    Each file is replaced whole. Figures that an earlier report left there, and that this one does not have, are removed. Raises
    UserError if ``folder`` holds files but no index of ours.
    """
    index = folder / INDEX
    earlier: list[str] = []
    if index.exists():
        earlier = [
            row["figure"]
            for row in csv.DictReader(io.StringIO(read_regular(index, JSON_LIMIT).decode("utf-8", "replace")))
            if row.get("figure")
        ]
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and holds no figures of clead; remove it, or give another name with --out")
    folder.mkdir(parents=True, exist_ok=True)
    names = {drawing.name for drawing in drawings}
    rows = [(drawing.name, drawing.label) for drawing in drawings]
    gone = [(name, "of an earlier report") for name in earlier if name not in names]
    # Before the files: whatever is killed, no file is there that the index does not name.
    write_atomically(index, _table(rows + gone))
    paths = []
    for drawing in drawings:
        content = {**drawing.pictures(), ".csv": drawing.csv().encode()}
        for suffix in SUFFIXES:
            paths.append(folder / f"{drawing.name}{suffix}")
            write_atomically(paths[-1], content[suffix])
    for name, _ in gone:
        if Path(name).name == name:  # an index may have been edited by hand
            for suffix in SUFFIXES:
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
    write_atomically(index, _table(rows))
    return paths


def _table(rows: Sequence[tuple[str, str]]) -> bytes:
    return csv_text([("figure", "shows"), *rows]).encode()
