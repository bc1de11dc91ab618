"""Image files listed in a table of paths and labels: CSV, TSV, JSON lines or a JSON list, as Kaggle and Hugging Face have them."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clead.data.base import RawSplit, RawSplits, Role, read_files, split_role
from clead.data.classes import number_labels
from clead.data.datasets import READERS, Reader
from clead.data.files import display, files_below, holds_image, visible_folders
from clead.data.tables import SUFFIXES, Table, first_rows, read_table
from clead.errors import UserError

_PATHS = (
    *(
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "image_name",
        "image_file",
    ),
    *("img", "img_path", "img_name", "image_id", "imageid", "id"),
)
_LABELS = (
    *("label", "labels", "class", "class_name", "classname", "class_id", "category", "category_id", "target"),
    *("breed", "species", "diagnosis", "y"),
)
_SPLITS = ("split", "subset", "set", "partition", "fold")
_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(\.0+)?")
_PIXELS = 49  # so many columns of numbers are an image
_STEMS = ("metadata", "labels", "annotations", "data", "dataset", "index")
_FOLDERS = ("images", "image", "imgs", "img", "jpg", "jpeg", "png", "train")
_NO_LABEL = ("", "nan", "null", "none", "n/a")  # as programs write a missing number
_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm"),
    *(".jfif", ".jpe", ".j2k"),
)


class Listed(NamedTuple):
    """One image of a table."""

    file: str
    label: str
    split: Role | None
    columns: dict[str, str]


def read_table_folder(path: Path) -> RawSplits:
    """Read the table at ``path``, or those of a folder: train.csv and test.csv, or one for all.

    Raises:
        UserError: columns are missing, paths lead nowhere or out of the folder, labels are empty or several for one image.
    """
    files = [path] if path.is_file() else _tables(path)
    named = [file for file in files if _role_of(file)]
    if not named and len(files) > 1:
        raise UserError(
            f"{path} holds several tables ({', '.join(file.name for file in files)}); give one of them: --data.path {files[0]}"
        )
    listed: list[Listed] = []
    notes: list[str] = []
    skipped: list[str] = []
    for file in named or files:
        rows, remarks, left = _listed(file)
        listed += [row._replace(split=row.split or (_role_of(file) if path.is_dir() else None)) for row in rows]
        notes, skipped = [*notes, *remarks], [*skipped, *left]
    skipped += [f"{file}: a table beside {named[0].name}" for file in files if named and file not in named]
    if path.is_dir():
        skipped += [f"{file}: a table without labels" for file in _unlabelled(path)]
        skipped += _unlisted(path, {row.file for row in listed})
    return _found(listed, path, notes, skipped)


def _unlisted(folder: Path, listed: set[str]) -> list[str]:
    """Return a line for each image below a folder that no table lists."""
    images = [file for file, reason in files_below(folder) if reason is None]
    real = {os.path.realpath(file) for file in listed} if any(str(image) not in listed for image in images) else set()
    return [
        f"{display(image)}: is in no row of a table"
        for image in images
        if str(image) not in listed and os.path.realpath(image) not in real
    ]


def _found(listed: list[Listed], path: Path, notes: list[str], skipped: list[str]) -> RawSplits:
    """Return the images in their splits; what has no split, if others have one, is for training."""
    listed, repeated = _without_repeats(listed, path)
    if repeated:
        notes.append(f"{repeated} rows of {path} repeat another and count once")
    values = [row.label for row in listed]
    whole = [_NUMBER.fullmatch(value) for value in values]
    numbers = [int(match[1]) for match in whole if match]
    (numbered,), classes, remarks = number_labels(numbers if len(numbers) == len(values) else values)
    parts: dict[str, RawSplit] = {}
    for split in ("train", "val", "test"):
        rows = [row for row, each in enumerate(listed) if (each.split or "train") == split]
        if rows:
            names = [listed[row].file for row in rows]
            keys = sorted({key for row in rows for key in listed[row].columns})
            columns = {key: [listed[row].columns.get(key, "") for row in rows] for key in keys}
            parts[split] = read_files(names, numbered[rows], columns)
    return RawSplits(
        **parts,
        classes=classes,
        skipped=tuple(skipped),
        notes=(*notes, *remarks),
        ordered=len(numbers) == len(values),
        unsplit=not any(row.split for row in listed),
    )


def _without_repeats(listed: list[Listed], path: Path) -> tuple[list[Listed], int]:
    """Return each image of a split once, and how many rows that leaves out; UserError if one image has several labels."""
    labels: dict[str, str] = {}
    for row in listed:
        if labels.setdefault(row.file, row.label) != row.label:
            raise UserError(
                f"{path}: {row.file} has the labels {labels[row.file]!r} and {row.label!r} (objects in "
                "images, or a multi-label set?), and a classifier here tells one class for each image; keep one row for each image"
            )
    once = {(row.file, row.split): row for row in reversed(listed)}
    unique = [row for row in listed if once[row.file, row.split] is row]
    return unique, len(listed) - len(unique)


def _listed(file: Path) -> tuple[list[Listed], list[str], list[str]]:
    """Return the images that a table lists, notes, and what is skipped."""
    _refuse_pixels(file)
    table = read_table(file)
    path_column, label_column = _needed(table, file)
    split_column, notes = find_split_column(table, file)
    labels = [row[label_column] for row in table.rows]
    numbers = all(label.lower() in _NO_LABEL or _NUMBER.fullmatch(label) for label in labels)
    missing = _NO_LABEL if numbers else ("",)  # "nan" is a name among names
    if empty := [line for label, line in zip(labels, table.lines, strict=True) if label.lower() in missing]:
        raise UserError(
            f"{file}: {len(empty)} rows have no label, the first in line {empty[0]}; fill it in or remove the rows"
        )
    lists = file.suffix.lower() not in (".csv", ".tsv")
    if several := [
        line for row, line in zip(table.rows, table.lines, strict=True) if lists and row[label_column][0] in "[{"
    ]:
        raise UserError(
            f"{file} line {several[0]}: a list of labels makes it a multi-label set, and a classifier here tells one class for "
            "each image; keep one label, or write a CSV with a column for each label: --task multilabel --data.name multilabel"
        )
    names = [row[path_column] for row in table.rows]
    files = resolved(names, file)
    candidates = [k for k in range(len(table.columns)) if k not in (path_column, label_column, split_column)]
    listed = [
        Listed(
            where,
            row[label_column],
            split_role(row[split_column]) if split_column is not None else _role_in(name),
            {table.columns[k]: row[k] for k in candidates},
        )
        for where, name, row in zip(files, names, table.rows, strict=True)
    ]
    if split_column is None and not all(row.split for row in listed):  # folders of all, or of none
        listed = [row._replace(split=None) for row in listed]
    return listed, [*table.notes, *notes], []


def _refuse_pixels(file: Path) -> None:
    """Raise UserError if the columns are pixels, as in copies of MNIST on Kaggle, before all of them are read."""
    head = first_rows(file)
    if head is None or not head.rows or _column(head, _PATHS) is not None:
        return
    lower = [name.lower() for name in head.columns]
    if "pixels" in lower:
        raise UserError(
            f"{file}: the column {head.columns[lower.index('pixels')]!r} holds pixel values, where a column of paths "
            f"belongs; convert it in Python: d = pandas.read_csv({str(file)!r}); "
            "x = numpy.stack([numpy.array(row.split(), 'uint8') for row in d.pixels]); "
            "numpy.savez('images.npz', x_train=x.reshape(len(x), HEIGHT, WIDTH), y_train=d.iloc[:, 0])"
        )
    values = [k for k, cell in enumerate(head.rows[0]) if cell.isdigit() and head.columns[k].lower() not in _LABELS]
    side = math.isqrt(len(values))
    if len(values) < _PIXELS:
        return
    shape = f"{side}, {side}" if side * side == len(values) else "HEIGHT, WIDTH"
    label = next((k for k, name in enumerate(head.columns) if name.lower() in _LABELS), 0)
    first = values[0] if len(values) < len(head.columns) else 1
    raise UserError(
        f"{file}: {len(values)} columns of pixel values, where a column of paths belongs; convert it in Python: d = "
        f"numpy.loadtxt({str(file)!r}, delimiter=',', skiprows=1, dtype=int); numpy.savez('images.npz', "
        f"x_train=d[:, {first}:{first + len(values)}].reshape(-1, {shape}).astype('uint8'), y_train=d[:, {label}])"
    )


def _needed(table: Table, file: Path) -> tuple[int, int]:
    """Return the numbers of the columns of paths and of labels."""
    path_column, label_column = _column(table, _PATHS), _column(table, _LABELS)
    if path_column is None or label_column is None:
        lacking = "paths (such as path)" if path_column is None else "labels (such as label)"
        first = ", ".join(table.columns)[:200]
        missing_header = any(os.path.splitext(cell)[1].lower() in _ENDINGS for cell in table.columns)
        remedy = "begin the file with a line of column names: path,label" if missing_header else "rename a column"
        if path_column is not None and _is_one_hot(table):
            remedy = "a column for each class must become one: d['label'] = d.iloc[:, 1:].idxmax(axis=1) in pandas"
        raise UserError(f"{file}: must have a column of {lacking}, got {first}; {remedy}")
    return path_column, label_column


def find_path_column(table: Table, file: Path) -> int:
    """Return the number of the column of paths; UserError if there is none."""
    if (column := _column(table, _PATHS)) is None:
        first = ", ".join(table.columns)[:200]
        raise UserError(f"{file}: must have a column of paths (such as path), got {first}; rename a column")
    return column


def _is_one_hot(table: Table) -> bool:
    """Say whether every row has a 1 in one of its columns and 0 in others."""
    return len(table.columns) > 2 and all(
        sum(cell in ("1", "1.0") for cell in row[1:]) == 1 and all(cell in ("0", "1", "0.0", "1.0") for cell in row[1:])
        for row in table.rows
    )


def _column(table: Table, wanted: Sequence[str]) -> int | None:
    names = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in table.columns]
    return next((names.index(each) for each in wanted if each in names), None)


def find_split_column(table: Table, file: Path) -> tuple[int | None, list[str]]:
    """Return the number of the column that names splits, and a note if a column called so does not."""
    column = _column(table, _SPLITS)
    if column is None:
        return None, []
    values = Counter(row[column] for row in table.rows)
    unknown = [value for value in values if split_role(value) is None]
    if len(unknown) == len(values):
        some = ", ".join(sorted(values)[:5])
        return None, [f"{file}: the column {table.columns[column]!r} names no splits ({some}) and is a value"]
    if unknown:
        raise UserError(
            f"{file}: the column {table.columns[column]!r} must name train, val or test, got {unknown[0]!r} in "
            f"{values[unknown[0]]} rows; rename or remove them"
        )
    return column, []


def resolved(names: Sequence[str], table: Path) -> list[str]:
    """Return the files that a table means; UserError if a name leads out of its folder, or to no file."""
    root = table.parent
    outside = [name for name in names if _leaves(name)]
    if outside:
        raise UserError(
            f"{table}: {len(outside)} of {len(names)} paths lead out of its folder, such as {outside[0]!r}; make them relative to "
            f"{root}"
        )
    best: list[str | None] = [None] * len(names)
    for base in _bases(table):
        files = _in(base, names)
        if sum(each is not None for each in files) > sum(each is not None for each in best):
            best = files
        if None not in best:
            break
    if missing := [name for name, file in zip(names, best, strict=True) if file is None]:
        raise UserError(
            f"{table}: {len(missing)} of {len(names)} images are missing, such as {missing[0]!r}; they must lie in {root}, in "
            f"{root / table.stem} or in {root / _FOLDERS[0]}: put them there, or remove the rows"
        )
    real = os.path.realpath(root)
    files = [file for file in best if file is not None]
    if linked := [file for file in files if os.path.commonpath([real, os.path.realpath(file)]) != real]:
        raise UserError(f"{table}: {linked[0]} is a link that leads out of {root}; copy the file there")
    return files


def _leaves(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return (
        not name
        or "\0" in name
        or ".." in parts
        or name.startswith(("/", "\\", "~"))
        or bool(re.match("[A-Za-z]:", name))
    )


def _bases(table: Path) -> list[Path]:
    """Return the folders that paths may be relative to."""
    stem = table.stem.lower()
    inside = [table.stem, *_FOLDERS, f"{stem}_images", f"{stem}-images"]
    return [table.parent, *(base for name in inside if (base := table.parent / name).is_dir())]


def _in(base: Path, names: Sequence[str]) -> list[str | None]:
    """Return for each name the file in ``base``, with or without the file's ending, or None."""
    stems: dict[str, dict[str, str]] = {}
    resolved: list[str | None] = []
    for name in names:
        relative = name.replace("\\", "/")
        file = os.path.join(base, relative)
        if os.path.isfile(file):
            resolved.append(file)
            continue
        folder, stem = os.path.split(file)
        if folder not in stems:
            entries = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            stems[folder] = {os.path.splitext(each)[0]: each for each in entries if each.lower().endswith(_ENDINGS)}
        entry = stems[folder].get(stem)
        resolved.append(os.path.join(folder, entry) if entry and os.path.isfile(os.path.join(folder, entry)) else None)
    return resolved


def _role_in(name: str) -> Role | None:
    """Return the split that a path begins with, as in train/cat.png."""
    first, *rest = name.replace("\\", "/").split("/")
    return split_role(first) if rest else None


def _role_of(file: Path) -> Role | None:
    """Return the split that a table is for, as train.csv or train/metadata.csv are."""
    return split_role(file.stem) or (split_role(file.parent.name) if file.stem in _STEMS else None)


def _candidates(folder: Path) -> list[Path]:
    """Return the tables of a folder by their names, and those of its splits' folders."""
    inside = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES[:4] and entry.is_file())
    files = [file for file in inside if file.stem.lower() in _STEMS or split_role(file.stem)]
    splits = sorted(entry for entry in folder.iterdir() if split_role(entry.name) and entry.is_dir())
    files += [file for split in splits for kind in SUFFIXES[:4] if (file := split / f"metadata{kind}").is_file()]
    return files


def _tables(folder: Path) -> list[Path]:
    """Return the tables whose first row leads to an image, those with usual names first.

    Where no class folders lie there, one table that looks as if it should do so is returned, too: its errors say what is amiss.
    """
    if files := [file for file in _candidates(folder) if _fits(file)]:
        return files
    if _has_class_folders(folder):
        return []
    tables = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES[:4] and entry.is_file())
    files = [file for file in tables if _fits(file)]
    return files or ([file for file in tables if _seems(file)] if len(tables) == 1 else [])


def _has_class_folders(folder: Path) -> bool:
    """Say whether images lie in several folders, or in folders of folders, so that their folders say their classes."""
    folders = [each for each in visible_folders(folder) if holds_image(each)]
    deeper = any(holds_image(inner) for each in folders for inner in visible_folders(each))
    return deeper or (len(folders) > 1 and not all(split_role(each.name) for each in folders))


def _seems(file: Path) -> bool:
    """Say whether a file has a column of paths, or pixels in its columns."""
    try:
        _refuse_pixels(file)
    except UserError:
        return True
    table = first_rows(file, 2)  # further ones may be what is damaged
    return table is not None and _column(table, _PATHS) is not None


def _fits(file: Path) -> bool:
    table = first_rows(file)
    if table is None or not table.rows or _column(table, _LABELS) is None:
        return False
    column = _column(table, _PATHS)
    name = "" if column is None else table.rows[0][column]
    return not _leaves(name) and any(_in(base, [name])[0] is not None for base in _bases(file))


def _unlabelled(folder: Path) -> list[Path]:
    """Return the tables that list images without labels, as Kaggle's test.csv does."""
    tables = {file: first_rows(file) for file in _candidates(folder)}
    return [
        file
        for file, table in tables.items()
        if table is not None and _column(table, _PATHS) is not None and _column(table, _LABELS) is None
    ]


READERS.register("table")(
    Reader(
        "FILE.csv or metadata.jsonl of paths and labels",
        lambda path: path.suffix.lower() in SUFFIXES if path.is_file() else bool(_tables(path)),
        read_table_folder,
        rank=80,
        includes=("folder",),
    )
)
