"""Parquet files in Hugging Face's layout, with the images' bytes inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from clead.data.base import Found, InMemoryDataset, Part, default_names, existing
from clead.data.datasets import DATASETS, READERS, Reader
from clead.errors import MissingExtra, UserError
from clead.settings import setting, settings

IMAGE, LABEL = ("img", "image"), ("label", "fine_label")


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
    shards = shards_of(folder, part)
    blobs: list[bytes] = []
    labels: list[torch.Tensor] = []
    where: list[str] = []
    names: list[list[str] | None] = []
    for shard in shards:
        image, label = (column_of(shard, wanted) for wanted in (IMAGE, LABEL))
        try:
            table = pyarrow.parquet.read_table(
                shard, columns=[image], partitioning=None, page_checksum_verification=True
            )
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(shard, error) from None
        images = [image and image.get("bytes") for image in table[image].to_pylist()]
        if None in images:
            raise UserError(
                f"{shard} row {images.index(None)}: the image has no bytes (only a path?); write the file "
                "with the images embedded"
            )
        blobs += images
        labels.append(label_column(shard, label))
        where += [f"{shard} row {row}" for row in range(len(images))]
        names.append(class_names(shard, label))
    if any(each != names[0] for each in names):
        raise UserError(f"{folder}: the {part} files name different classes; rewrite them with one list")
    return Part(blobs, torch.cat(labels), where), names[0]


def shards_of(folder: Path, part: str) -> list[Path]:
    """Return the files of ``part`` in order; UserError if there are none, or fewer than their names say."""
    shards = sorted(folder.glob(f"{part}-*.parquet"))
    if not shards:
        raise UserError(
            f"{folder} must hold train-*.parquet and test-*.parquet, got no {part}-*.parquet; check --data.path"
        )
    if (match := re.search(r"-of-(\d+)", shards[0].name)) and int(match[1]) != len(shards):
        raise UserError(f"{folder}: {shards[0].name} says {int(match[1])} files, got {len(shards)}; fetch the others")
    return shards


def column_of(shard: Path, wanted: tuple[str, ...]) -> str:
    """Return which of the ``wanted`` columns, ``IMAGE`` or ``LABEL``, a file has; UserError if none, or of another type."""
    schema = _schema(shard)
    for name in wanted:
        if name in schema.names:
            kind = str(schema.field(name).type)
            if name in IMAGE and kind.startswith("struct<") and "bytes: " in kind:
                return name
            if name in LABEL and re.fullmatch(r"u?int\d+", kind):
                return name
            rule = "a struct of bytes and path" if name in IMAGE else "integers"
            raise UserError(
                f"{shard}: the column {name!r} must be {rule}, got {kind}; rewrite the file in Hugging Face's layout"
            )
    raise UserError(
        f"{shard}: needs a column {' or '.join(map(repr, wanted))}, got {', '.join(schema.names)}; rename one"
    )


def label_column(shard: Path, column: str) -> torch.Tensor:
    """Return a file's labels, (n,) int64; UserError if one is empty."""
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(shard, columns=[column], partitioning=None, page_checksum_verification=True)[
            column
        ]
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(shard, error) from None
    if found.null_count:
        row = found.is_null().to_pylist().index(True)
        raise UserError(f"{shard} row {row}: the label is empty; fill it in or remove the row")
    return torch.from_numpy(found.to_numpy().astype("int64"))


def class_names(shard: Path, label: str) -> list[str] | None:
    """Return the names in a file's Hugging Face metadata, or None if it has none."""
    try:
        names = json.loads((_schema(shard).metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return list(map(str, names)) or None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _schema(shard: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading Parquet files") from None
    try:
        return pyarrow.parquet.read_schema(shard)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(shard, error) from None


def _unreadable(shard: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{shard}: not a readable Parquet file ({reason}); fetch it again")


READERS.register("parquet")(Reader("train-*.parquet and test-*.parquet", has_parquet, read_parquet))
