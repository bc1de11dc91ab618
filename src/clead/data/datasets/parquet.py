"""Parquet files in Hugging Face's layouts, with the images' bytes inside."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clead.data.base import InMemoryDataset, RawSplit, RawSplits, Role, resolve_path, split_role
from clead.data.classes import number_labels
from clead.data.datasets import DATASETS, READERS, Reader
from clead.data.files import display, files_below, visible_folders
from clead.errors import UserError, first_line, needs_extra
from clead.settings import setting, settings

IMAGE = ("img", "image", "pixel_values", "picture", "photo", "images", "jpg", "jpeg", "png", "webp")
LABEL = ("label", "fine_label", "labels", "class", "category", "target", "coarse_label", "cls", "y")
_TEXT, _INTEGER, _BYTES = r"(large_)?string|dictionary<values=(large_)?string.*", r"u?int\d+|bool", r"(large_)?binary"
_DEEPEST = 3  # folders between the path and a file


@DATASETS.register("parquet")
@settings
class Parquet(InMemoryDataset):
    """A folder with train-*.parquet and test-*.parquet in Hugging Face's layouts: also in data/ or the folder of a configuration.

    Splits are named by files or folders: train, val, valid, validation or dev, test. Columns: an image (img, image, … : a struct of
    bytes and path, or bytes) and a label (label, labels, fine_label, class …: integers or text). Other columns of text and integers
    can be named by group_by and only.
    """

    path: Path = setting(..., "The folder that holds the Parquet files, or one file.")

    def read(self) -> RawSplits:
        """Return the encoded images; raises UserError for another layout, MissingExtra without pyarrow."""
        return read_parquet(resolve_path(self.path))


class ParquetFiles(NamedTuple):
    """The files of one data set: of each split in order, and whether no name says of which split they are."""

    folder: Path
    splits: dict[Role, list[Path]]
    unsplit: bool


def has_parquet(path: Path) -> bool:
    """Say whether the path is a Parquet file, or a folder with some, at most three folders deep."""
    if path.is_file():
        return path.suffix.lower() == ".parquet"
    return path.is_dir() and bool(_parquet_files(path))


def read_parquet(path: Path) -> RawSplits:
    """Read all shards of every split.

    Raises:
        UserError: several configurations, or no columns of images and labels, or a file cannot be read.
    """
    files = parquet_files(path)
    read = {role: _read_split(path, shards, role) for role, shards in files.splits.items()}
    notes = list(dict.fromkeys(note for split in read.values() for note in split.notes))
    for role in [role for role, split in read.items() if len(split.labels) and split.is_unlabelled]:
        notes.append(f"the {role} split has no labels (all are -1), so it is not read")
        del read[role]
    if not read:
        raise UserError(
            f"{path}: {notes[-1]}, and there is no other; fetch the train or validation split, or add the labels"
        )
    names, ordered = _class_names(files.folder, {role: split.names for role, split in read.items()}), True
    if names is None:
        numbered, classes, more = number_labels(*(split.labels for split in read.values()))
        notes, ordered = [*notes, *more], all(split.labels.dtype.kind in "biu" for split in read.values())
    else:
        numbered, classes = [by_name(files.folder, split.labels, names) for split in read.values()], tuple(names)
    parts = {
        role: RawSplit(split.images, labels, split.where, split.columns)
        for (role, split), labels in zip(read.items(), numbered, strict=True)
    }
    taken = {shard.resolve() for shards in files.splits.values() for shard in shards}
    taken |= {file for split in read.values() for file in split.beside}
    return RawSplits(
        **parts,
        classes=classes,
        skipped=unread(path, taken),
        notes=tuple(notes),
        ordered=ordered,
        unsplit=files.unsplit,
    )


def parquet_files(path: Path) -> ParquetFiles:
    """Find the files of each split below a path; UserError if there are none, too few or those of several configurations."""
    paths = [path] if path.is_file() else _parquet_files(path)
    if not paths:
        raise UserError(
            f"{path} must hold train-*.parquet and test-*.parquet, got no *.parquet; check --data.path, or give --data.name auto"
        )
    groups: dict[Path, dict[Role | None, list[Path]]] = {}
    for file in paths:
        named = split_role(file.parent.name) if file.parent != path else None
        role = _role_of(file.stem) or named
        folder = file.parent.parent if named else file.parent
        groups.setdefault(folder, {}).setdefault(role, []).append(file)
    if path in groups and any(groups[path]):
        groups = {path: groups[path]}
    if len(groups) > 1:
        listed = ", ".join(sorted(str(folder.relative_to(path)) for folder in groups))
        raise UserError(
            f"{path} holds several sets of Parquet files: {listed}; give the folder of one: --data.path {sorted(groups)[0]}"
        )
    ((folder, by_role),) = groups.items()
    splits: dict[Role, list[Path]] = {}
    for role in ("train", "val", "test"):
        if files := by_role.get(role):
            splits[role] = _whole(files)
    if set(splits) == {"train"} and None in by_role:
        other = by_role[None][0]
        raise UserError(
            f"{other}: this name says no split, and beside {splits['train'][0].name} it may hold images that are held out; "
            f"rename it to {other.with_name('test.parquet')}, or move it elsewhere"
        )
    if not splits:
        return ParquetFiles(folder, {"train": _whole(by_role[None])}, True)
    return ParquetFiles(folder, splits, False)


def _parquet_files(path: Path, deeper: int = _DEEPEST) -> list[Path]:
    """Return the files below a folder that are not hidden, in no linked folder and not too deep, sorted in every folder."""
    files = [file for file in sorted(path.glob("*.parquet")) if file.is_file() and not file.name.startswith(".")]
    for inner in visible_folders(path) if deeper > 1 else ():
        if not inner.is_symlink():
            files += _parquet_files(inner, deeper - 1)
    return files


def _role_of(stem: str) -> Role | None:
    """Return the split that the name of a file says: its first word that is one, as in train-00000-of-00001 or mnist_test."""
    return next((role for word in re.split(r"[^A-Za-z]+", stem) if (role := split_role(word))), None)


def _whole(shards: list[Path]) -> list[Path]:
    """Return the files in order; UserError if they are fewer than their names say."""
    shards = sorted(shards)
    if (match := re.search(r"-of-(\d+)", shards[0].name)) and int(match[1]) != len(shards):
        raise UserError(
            f"{shards[0].parent}: {shards[0].name} says {int(match[1])} files, got {len(shards)}; fetch the others"
        )
    return shards


class _Split(NamedTuple):
    """What the files of one split hold: labels (n,) integers or text; ``beside``: image files that they only name."""

    images: list[bytes]
    labels: np.ndarray
    where: list[str]
    names: list[str] | None
    columns: dict[str, list[str]]
    beside: list[Path]
    notes: list[str]

    @property
    def is_unlabelled(self) -> bool:
        return self.labels.dtype.kind in "iu" and bool((self.labels == -1).all())


def _read_split(root: Path, shards: Sequence[Path], role: Role) -> _Split:
    split = _Split([], np.empty(0, np.int64), [], None, {}, [], [])
    labels, names = [], []
    columns: dict[str, list[list[str]]] = {}
    for shard in shards:
        image, note = choose_column(shard, IMAGE)
        label, other = choose_column(shard, LABEL)
        split.notes.extend(filter(None, (note, other)))
        blobs, paths = images_in(shard, image, root, split.beside)
        split.images.extend(blobs)
        split.where.extend(f"{shard} row {row}" for row in range(len(blobs)))
        labels.append(label_column(shard, label))
        names.append(class_names(shard, label))
        for name, values in {**_other_columns(shard, image, label), **({"file": paths} if any(paths) else {})}.items():
            columns.setdefault(name, []).append(values)
    if any(each != names[0] for each in names):
        raise UserError(f"{shards[0].parent}: the {role} files name different classes; rewrite them with one list")
    if len({each.dtype.kind for each in labels}) > 1:
        raise UserError(
            f"{shards[0].parent}: the labels of the {role} files are text and integers; rewrite them as one"
        )
    whole = {name: sum(values, []) for name, values in columns.items() if len(values) == len(shards)}
    return split._replace(labels=np.concatenate(labels), names=names[0], columns=whole)


def images_in(
    shard: Path, column: str, root: Path, beside: list[Path], what: str = "image"
) -> tuple[list[bytes], list[str]]:
    """Return a file's images and the paths that it tells of them; what lies beside it is read, and added to ``beside``."""
    values = _column(shard, column).to_pylist()
    blobs: list[bytes] = []
    paths: list[str] = []
    for row, value in enumerate(values):
        blob, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if (
            blob is None
            and path
            and (file := _beside(str(path), (shard.parent, root if root.is_dir() else root.parent)))
        ):
            beside.append(file)
            blob = file.read_bytes()
        if blob is None:
            hint = f"; {path} does not lie beside it" if path else ""
            raise UserError(
                f"{shard} row {row}: the {what} has no bytes{hint}; write the file with the {what}s embedded, or remove the row"
            )
        blobs.append(blob)
        paths.append(str(path or ""))
    return blobs, paths


def _beside(path: str, folders: Sequence[Path]) -> Path | None:
    """Return the file that a row names, if it lies in one of ``folders``, and not outside of the last."""
    for folder in folders:
        file = (folder / path).resolve()
        if file.is_relative_to(folders[-1].resolve()) and file.is_file():
            return file
    return None


def choose_column(shard: Path, wanted: tuple[str, ...]) -> tuple[str, str | None]:
    """Return which of the ``wanted`` columns a file has, and a note if there are several: ``LABEL``, ``IMAGE``, or those of masks.

    Raises:
        UserError: there is none, or it is of a type that is not read.
    """
    schema = _schema(shard)
    what = {IMAGE: "image", LABEL: "label"}.get(wanted, "mask")
    candidates = [name for name in wanted if name in schema.names]
    candidates += [each for each in schema.names if each.lower() in wanted and each not in candidates]
    if not candidates:
        example = f'table.rename_columns({{"NAME": "{what}"}})'
        if wanted is LABEL and "mask" in schema.names:
            raise UserError(
                f"{shard}: has a column of masks and none of labels; give --data.name masks and --task segmentation"
            )
        raise UserError(
            f"{shard}: needs a column {', '.join(map(repr, wanted[:2]))} or such with the {what}s, got {', '.join(schema.names)}; "
            f"rename one, with pyarrow: {example}"
        )
    name = candidates[0]
    kind = str(schema.field(name).type)
    is_image = (kind.startswith("struct<") and "bytes: " in kind) or re.fullmatch(_BYTES, kind)
    is_label = re.fullmatch(f"{_INTEGER}|{_TEXT}|{_BYTES}", kind)
    if not (is_label if wanted is LABEL else is_image):
        rule = "integers or text" if wanted is LABEL else "a struct of bytes and path, or bytes of image files"
        remedy = "rewrite the file in Hugging Face's layout"
        if wanted is LABEL and kind in ("float", "double", "halffloat"):
            remedy = "convert it, with pandas: d = pandas.read_parquet(FILE); "
            remedy += f"d[{name!r}] = d[{name!r}].astype(int); d.to_parquet(FILE)"
        if wanted is LABEL and "list<" in kind:
            remedy = "several labels per image are read with --task multilabel --data.name multilabel"
        raise UserError(f"{shard}: the column {name!r} must be {rule}, got {kind[:60]}; {remedy}")
    further = candidates[1:]
    note = f"the column {name!r} holds the {what}s, not {' or '.join(map(repr, further))}" if further else None
    return name, note


def label_column(shard: Path, column: str) -> np.ndarray:
    """Return a file's labels, (n,) int64 or text; UserError if one is empty."""
    values = _column(shard, column)
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise UserError(f"{shard} row {row}: the label is empty; fill it in or remove the row")
    if re.fullmatch(_BYTES, str(values.type)):
        return np.array([value.decode("utf-8", "replace") for value in values.to_pylist()], dtype=str)
    if re.fullmatch(_TEXT, str(values.type)):
        return np.array(values.to_pylist(), dtype=object).astype(str) if len(values) else np.empty(0, np.int64)
    return (
        np.array(values.to_pylist(), dtype=np.int64)
        if str(values.type) == "bool"
        else values.to_numpy().astype("int64")
    )


def _other_columns(shard: Path, image: str, label: str) -> dict[str, list[str]]:
    """Return the other columns of text and integers, as text."""
    schema = _schema(shard)
    wanted = [
        field.name
        for field in schema
        if field.name not in (image, label) and re.fullmatch(f"{_INTEGER}|{_TEXT}", str(field.type))
    ]
    return {
        name: ["" if value is None else str(value) for value in _column(shard, name).to_pylist()] for name in wanted
    }


def read_columns(shard: Path) -> dict[str, list[Any]]:
    """Return every column of a file as a list of Python values."""
    return {name: _column(shard, name).to_pylist() for name in _schema(shard).names}


def _column(shard: Path, column: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(shard, columns=[column], partitioning=None, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(shard, error) from None
    return table[column]


def class_names(shard: Path, label: str) -> list[str] | None:
    """Return the names in a file's Hugging Face metadata, or None if it has none."""
    try:
        names = json.loads((_schema(shard).metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return list(map(str, names)) or None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _class_names(folder: Path, names: dict[Role, list[str] | None]) -> list[str] | None:
    """Return the one list of names that the splits have; UserError if they differ."""
    lists = list(names.values())
    for other in lists[1:]:
        if other != lists[0]:
            listed = " and ".join(str(each) for each in (lists[0], other))
            raise UserError(
                f"{folder}: {' and '.join(names)} must name the same classes in one order, got {listed[:300]}; rewrite one"
            )
    return lists[0] if lists else None


def by_name(folder: Path, labels: np.ndarray, names: list[str]) -> torch.Tensor:
    """Return the number of each label: itself, or the place of its text among the names."""
    if labels.dtype.kind in "biu":
        return torch.from_numpy(labels.astype(np.int64))
    number = {name: k for k, name in enumerate(names)}
    if unknown := sorted(set(labels.tolist()) - set(names)):
        raise UserError(
            f"{folder}: the label {unknown[0]!r} is none of the named classes {', '.join(names)[:200]}; name it too"
        )
    return torch.tensor([number[label] for label in labels.tolist()], dtype=torch.int64)


def unread(path: Path, taken: set[Path]) -> tuple[str, ...]:
    """Return a line for each file below a folder that is not among ``taken``, which are resolved."""
    if path.is_file():
        return ()
    return tuple(
        f"{display(file)}: is not part of the Parquet files that are read"
        for file, _ in files_below(path)
        if file.resolve() not in taken
    )


def _schema(shard: Path) -> Any:
    with needs_extra("data", "reading Parquet files"):
        import pyarrow
        import pyarrow.parquet
    try:
        return pyarrow.parquet.read_schema(shard)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(shard, error) from None


def _unreadable(shard: Path, error: Exception) -> UserError:
    return UserError(f"{shard}: not a readable Parquet file ({first_line(error)}); fetch it again")


READERS.register("parquet")(
    Reader("train-*.parquet and test-*.parquet", has_parquet, read_parquet, includes=("folder",))
)
