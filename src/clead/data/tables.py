"""Rows of texts from CSV, TSV, JSON lines and JSON lists, however they were saved."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clead.data.bounded import read_file
from clead.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_HEAD = 1 << 16
_DELIMITERS = ",;\t|"


class Table(NamedTuple):
    """Column names, rows of as many texts, the line in the file where each row stands, and notes."""

    columns: list[str]
    rows: list[list[str]]
    lines: list[int]
    notes: tuple[str, ...] = ()


def read_table(file: Path) -> Table:
    """Read a file by its ending; raises UserError, naming the line, if it is damaged."""
    text, notes = _decoded(read_file(file), file)
    table = (
        _delimited(text, file) if file.suffix.lower() in (".csv", ".tsv") else _objects(_json_rows(text, file), file)
    )
    return table._replace(notes=notes)


def first_rows(file: Path, lines: int = 3) -> Table | None:
    """Return the header and first rows, ``lines`` in all, of a CSV, TSV or JSON lines file; None if it is none."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if len(head) == _HEAD:
        head = head[: head.rfind(b"\n")]  # whole lines
    try:
        first = "\n".join(_decoded(head, file)[0].splitlines()[:lines])
        if file.suffix.lower() in (".csv", ".tsv"):
            return _delimited(first, file)
        return _objects(_json_rows(first, file), file) if file.suffix.lower() != ".json" else None
    except UserError:
        return None


def _decoded(content: bytes, file: Path) -> tuple[str, tuple[str, ...]]:
    """Return the text of UTF-8, of UTF-16 with its mark, or else of Latin-1, which a note says."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace"), ()
    try:
        return content.decode("utf-8-sig"), ()
    except UnicodeDecodeError:
        note = f"{file} is not UTF-8 and is read as Latin-1; save it as UTF-8 if names look wrong"
        return content.decode("latin-1"), (note,)


def _delimited(text: str, file: Path) -> Table:
    if "\0" in text:
        raise UserError(f"{file} holds zero bytes and is no text; save it as CSV again")
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(_DELIMITERS, key=header.count)
    rows, lines = [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: cannot be read ({error}); mend the line") from None
    if not rows:
        raise UserError(f"{file} is empty; it must begin with a line of column names, such as path,label")
    columns = rows.pop(0)
    lines.pop(0)
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(columns):
            raise UserError(
                f"{file} line {line} must have {len(columns)} values as the first line, got {len(row)}; mend the line, and put "
                f'names with {delimiter!r} in quotes: "a{delimiter}b"'
            )
    return Table(columns, rows, lines)


def _json_rows(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of JSON lines, or of the elements of a JSON list, or path and label of a JSON map."""
    if file.suffix.lower() != ".json":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _parsed(line, file, number)
        return
    value = _parsed(text, file, None)
    if isinstance(value, dict) and {"images", "annotations"} <= set(value):
        raise UserError(
            f"{file} is in COCO's format of objects in images, and a classifier needs one label for each image; write a CSV with "
            "the columns path,label"
        )
    if isinstance(value, dict) and value and all(isinstance(each, (str, int)) for each in value.values()):
        value = [{"path": path, "label": label} for path, label in value.items()]
    if not isinstance(value, list):
        raise UserError(
            f'{file} must be a list of objects, [{{"path": …, "label": …}}, …], or a map from path to label'
        )
    yield from enumerate(value, 1)


def _parsed(text: str, file: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" line {line}" if line is not None else ""
        raise UserError(f"{file}{where}: not JSON ({str(error)[:200]}); mend or remove it") from None


def _objects(values: Iterator[tuple[int, Any]], file: Path) -> Table:
    columns: dict[str, None] = {}
    objects, lines = [], []
    for line, value in values:
        if not isinstance(value, dict):
            raise UserError(
                f'{file} line {line} must be an object such as {{"path": …, "label": …}}, got {str(value)[:80]!r}'
            )
        columns |= dict.fromkeys(value)
        objects.append(value)
        lines.append(line)
    if not objects:
        raise UserError(f'{file} is empty; it must hold objects such as {{"path": …, "label": …}}')
    return Table(list(columns), [[_text(value.get(key)) for key in columns] for value in objects], lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
