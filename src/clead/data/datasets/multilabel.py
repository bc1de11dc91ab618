"""Several labels per image: a table with a column for each label, or Parquet files with a list of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clead.data.base import InMemoryDataset, RawSplit, RawSplits, Role, read_files, resolve_path, split_role
from clead.data.classes import class_order
from clead.data.datasets import DATASETS
from clead.data.datasets.parquet import IMAGE, LABEL, choose_column, images_in, parquet_files, read_columns
from clead.data.datasets.table import find_path_column, find_split_column, resolved
from clead.data.tables import SUFFIXES, read_table
from clead.errors import UserError
from clead.settings import setting, settings

_VALUES = {"1": 1, "0": 0, "-1": -1, "": -1, "true": 1, "false": 0, "nan": -1, "none": -1, "null": -1}
"""What a cell of a label's column may say, a whole number also with .0 after it: present, absent, or unknown."""


@DATASETS.register("multilabel")
@settings
class MultiLabelImages(InMemoryDataset):
    """Several labels per image, for the task multilabel: a CSV or TSV table, or Parquet files (one file, or a folder of splits).

    A table has a column of paths, perhaps one of splits, and a column for each label: 1 present, 0 absent, empty or −1 unknown.
    Parquet files have a column of images, and either such columns, or a list of the labels that an image has (a column named label
    or labels), text or numbers; labels in the list of a column unknown are unknown.
    """

    path: Path = setting(..., "The table, the Parquet file, or the folder of Parquet files.")
    columns: str | None = setting(
        None,
        "The columns that are labels, with commas between them; none: all that hold nothing but 0, 1, -1 or nothing.",
    )

    def read(self) -> RawSplits:
        """Return the images with labels (N, L) of 0, 1 and −1; raises UserError for another layout."""
        path = resolve_path(self.path)
        chosen = None if self.columns is None else [name.strip() for name in self.columns.split(",") if name.strip()]
        if path.is_file() and path.suffix.lower() in SUFFIXES[:2]:
            return _read_table(path, chosen)
        files = parquet_files(path)
        read = {role: _read_parquet(path, shards, chosen) for role, shards in files.splits.items()}
        lists = [labels for _, labels, _ in read.values() if isinstance(labels, _Lists)]
        names = class_order({name for each in lists for row in each.present + each.unknown for name in row})
        names = names or next(iter(read.values()))[2]
        if other := [kinds for _, _, kinds in read.values() if not lists and kinds != names]:
            raise UserError(
                f"{path}: the splits have the labels {', '.join(names)} and {', '.join(other[0])}; give both the same columns"
            )
        splits = {
            role: RawSplit(images, labels.of(names) if isinstance(labels, _Lists) else labels, where)
            for role, ((images, where), labels, _) in read.items()
        }
        return RawSplits(**splits, classes=tuple(names), ordered=True, unsplit=files.unsplit)


class _Lists:
    """The labels that each image has, and those of which nobody knows."""

    def __init__(self, present: list[list[str]], unknown: list[list[str]]) -> None:
        self.present, self.unknown = present, unknown

    def of(self, names: Sequence[str]) -> Tensor:
        """Return them as (N, L) of 0, 1 and −1."""
        number = {name: k for k, name in enumerate(names)}
        labels = torch.zeros(len(self.present), len(names), dtype=torch.int64)
        for row, (present, unknown) in enumerate(zip(self.present, self.unknown, strict=True)):
            labels[row, [number[name] for name in unknown]] = -1
            labels[row, [number[name] for name in present]] = 1
        return labels


def _read_table(file: Path, chosen: list[str] | None) -> RawSplits:
    table = read_table(file)
    paths = find_path_column(table, file)
    splits, notes = find_split_column(table, file)
    cells = {name: [row[k] for row in table.rows] for k, name in enumerate(table.columns) if k not in (paths, splits)}
    labels, names = _from_columns(cells, chosen, file, [f"line {line}" for line in table.lines])
    files = resolved([row[paths] for row in table.rows], file)
    roles: list[Role | None] = [None if splits is None else split_role(row[splits]) for row in table.rows]
    parts: dict[str, Any] = {}
    for role in ("train", "val", "test"):
        rows = [k for k, each in enumerate(roles) if (each or "train") == role]
        if rows:
            parts[role] = read_files([files[k] for k in rows], labels[rows])
    unsplit = not any(roles)
    return RawSplits(**parts, classes=tuple(names), notes=(*table.notes, *notes), ordered=True, unsplit=unsplit)


def _read_parquet(
    root: Path, shards: Sequence[Path], chosen: list[str] | None
) -> tuple[tuple[list[bytes], list[str]], Tensor | _Lists, list[str]]:
    """Return the images of a split and what to call them, their labels, and the names of these if columns are."""
    images: list[bytes] = []
    where: list[str] = []
    cells: dict[str, list[str]] = {}
    lists = _Lists([], [])
    for shard in shards:
        image, _ = choose_column(shard, IMAGE)
        blobs, _ = images_in(shard, image, root, [])
        images, where = [*images, *blobs], [*where, *(f"{shard} row {row}" for row in range(len(blobs)))]
        columns = {name: values for name, values in read_columns(shard).items() if name != image}
        label = next((name for name in LABEL if name in columns and _is_list(columns[name])), None)
        if label is not None and chosen is None:
            lists.present += _texts(shard, label, columns[label])
            lists.unknown += _texts(shard, "unknown", columns.get("unknown", [[]] * len(blobs)))
            continue
        for name, values in columns.items():
            if not _is_list(values):
                cells.setdefault(name, []).extend("" if value is None else str(value) for value in values)
    if lists.present:
        return (images, where), lists, []
    whole = {name: values for name, values in cells.items() if len(values) == len(images)}
    labels, names = _from_columns(whole, chosen, root, where)
    return (images, where), labels, names


def _is_list(values: Sequence[Any]) -> bool:
    return any(isinstance(value, list | np.ndarray) for value in values)


def _texts(shard: Path, column: str, values: Sequence[Any]) -> list[list[str]]:
    """Return lists of labels as text; UserError if one is missing."""
    for row, value in enumerate(values):
        if value is None or any(each is None for each in value):
            raise UserError(
                f"{shard} row {row}: the list {column!r} is empty of meaning, got {value!r}; write [] for no label, and name "
                "unknown ones in a column unknown"
            )
    return [[str(each) for each in value] for value in values]


def _from_columns(
    cells: dict[str, list[str]], chosen: list[str] | None, source: Path, where: Sequence[str]
) -> tuple[Tensor, list[str]]:
    """Return the labels (N, L) of the columns that are labels, and their names."""
    if missing := [name for name in chosen or () if name not in cells]:
        raise UserError(
            f"data.columns: {source} has no column {missing[0]!r}, but {', '.join(cells) or 'none'}; give one of these"
        )
    names = chosen or [
        name for name, values in cells.items() if all(_plain(value) in _VALUES for value in values) and any(values)
    ]
    if len(names) < 2:
        raise UserError(
            f"{source}: needs at least two columns of labels, each cell 0, 1, -1 or empty, got {', '.join(names) or 'none'} of "
            f"{', '.join(cells) or 'no column'}; give a column for each label, or data.name auto for one class per image"
        )
    for name in names:
        for row, value in zip(where, cells[name], strict=True):
            if _plain(value) not in _VALUES:
                raise UserError(
                    f"{source} {row}: the label {name!r} must be 0, 1, -1 or empty (unknown), got {value!r}; change it, or name "
                    "the columns of labels: --data.columns a,b"
                )
    return torch.tensor([[_VALUES[_plain(value)] for value in cells[name]] for name in names]).T.contiguous(), names


def _plain(value: str) -> str:
    """Return a cell as ``_VALUES`` has it.

    >>> _plain("1.0"), _plain("False"), _plain(" ")
    ('1', 'false', '')
    """
    return value.strip().lower().removesuffix(".0")
