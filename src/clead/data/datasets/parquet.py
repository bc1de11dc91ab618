"""Parquet files in Hugging Face's layout, with the images' bytes inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from clead.data.base import Found, InMemoryDataset, Part, default_names, existing
from clead.data.datasets import DATASETS
from clead.errors import MissingExtra, UserError
from clead.settings import setting, settings

_IMAGE, _LABEL = ("img", "image"), ("label", "fine_label")


@DATASETS.register("parquet")
@settings
class Parquet(InMemoryDataset):
    """A folder with train-*.parquet and test-*.parquet in Hugging Face's layout (also in a subfolder data/).

    Columns: img or image (a struct of bytes and path) and label or fine_label (integers).
    """

    path: Path = setting(..., "The folder that holds the Parquet files.")

    def read(self) -> Found:
        """Return the encoded images; raises UserError for another layout, MissingExtra without pyarrow."""
        return read_parquet(existing(self.path))


def has_parquet(path: Path) -> bool:
    """Tell whether the folder looks like this layout."""
    return any(any(folder.glob(f"{part}-*.parquet")) for folder in (path, path / "data") for part in ("train", "test"))


def read_parquet(path: Path) -> Found:
    """Read all shards of both splits."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading Parquet files") from None
    folder = path / "data" if not any(path.glob("*.parquet")) and (path / "data").is_dir() else path
    (train, names), (test, test_names) = (_read_part(folder, part, pyarrow) for part in ("train", "test"))
    if names != test_names:
        raise UserError(
            f"{folder}: train and test must name the same classes in one order, got {names} and "
            f"{test_names}; rewrite one"
        )
    return Found(train, test, tuple(names) if names else default_names(train.labels, test.labels))


def _read_part(folder: Path, part: str, pyarrow: Any) -> tuple[Part, list[str] | None]:
    shards = sorted(folder.glob(f"{part}-*.parquet"))
    if not shards:
        raise UserError(
            f"{folder} must hold train-*.parquet and test-*.parquet, got no {part}-*.parquet; check --data.path"
        )
    if (match := re.search(r"-of-(\d+)", shards[0].name)) and int(match[1]) != len(shards):
        raise UserError(f"{folder}: {shards[0].name} says {int(match[1])} files, got {len(shards)}; fetch the others")
    blobs: list[bytes] = []
    labels: list[int] = []
    where: list[str] = []
    names: list[list[str] | None] = []
    for shard in shards:
        try:
            schema = pyarrow.parquet.read_schema(shard)
            columns = [_column(schema, wanted, shard) for wanted in (_IMAGE, _LABEL)]
            table = pyarrow.parquet.read_table(shard, columns=columns, partitioning=None)
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{shard}: not a readable Parquet file ({reason}); fetch it again") from None
        images = [image and image.get("bytes") for image in table[columns[0]].to_pylist()]
        if None in images:
            raise UserError(
                f"{shard} row {images.index(None)}: the image has no bytes (only a path?); write the file "
                "with the images embedded"
            )
        numbers = table[columns[1]].to_pylist()
        if None in numbers:
            raise UserError(f"{shard} row {numbers.index(None)}: the label is empty; fill it in or remove the row")
        blobs += images
        labels += numbers
        where += [f"{shard} row {row}" for row in range(len(images))]
        names.append(_class_names(schema, columns[1]))
    if any(each != names[0] for each in names):
        raise UserError(f"{folder}: the {part} files name different classes; rewrite them with one list")
    return Part(blobs, torch.tensor(labels, dtype=torch.int64), where), names[0]


def _column(schema: Any, wanted: tuple[str, ...], shard: Path) -> str:
    for name in wanted:
        if name in schema.names:
            kind = str(schema.field(name).type)
            if name in _IMAGE and kind.startswith("struct<") and "bytes: " in kind:
                return name
            if name in _LABEL and re.fullmatch(r"u?int\d+", kind):
                return name
            rule = "a struct of bytes and path" if name in _IMAGE else "integers"
            raise UserError(
                f"{shard}: the column {name!r} must be {rule}, got {kind}; rewrite the file in Hugging Face's layout"
            )
    raise UserError(
        f"{shard}: needs a column {' or '.join(map(repr, wanted))}, got {', '.join(schema.names)}; rename one"
    )


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Return the names in the schema's Hugging Face metadata, or None if it has none."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return list(map(str, names)) or None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
