"""What a data set holds, also one that training would refuse: splits, sizes, classes, files left out, duplicates."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from clead.data.base import (
    InMemoryDataset,
    RawSplit,
    RawSplits,
    assign_splits,
    at,
    check,
    cut,
    renumber,
    resolve_path,
    say_remarks,
)
from clead.data.datasets import READERS
from clead.data.datasets.auto import Auto, recognizes
from clead.data.decoding import ResizeSpec, decode_one
from clead.data.duplicates import Duplicates, Split, digest, find_duplicates
from clead.data.flips import SAMPLE
from clead.data.label_sampling import stratified
from clead.data.survey import TITLES, Survey, summarise
from clead.errors import MissingExtra, UserError
from clead.tasks import fitting_tasks

NEAR = 20_000
"""Nearly equal images are looked for among so many."""
_SMALL = 64  # side of the copies that are compared and shown
_CHUNK = 256
_SHOWN_CLASSES, _SHOWN_IMAGES = 40, 8
_CAPTION = 110  # pixels of a contact sheet's column of names


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What ``inspect_data`` found.

    Args:
        layout: the layout as which it is read.
        splits: split -> number of images, as they would be used: ``train``, ``val``, ``test``.
        origin: where the test images come from, as ``clead.interfaces.Splits.origin``; "" if training cannot have any.
        classes: name -> split -> number of images, in the order of the class numbers.
        sizes: ``"WIDTHxHEIGHT"`` -> number of images, the commonest first.
        channels: ``grey`` and ``colour`` -> number of images.
        unreadable: one line per image that cannot be decoded.
        skipped: one line per file that is there and is not read.
        duplicates: equal and nearly equal images.
        notes: what must be known of the data, one sentence each.
        survey: the numbers by which a training is planned; None if there is nothing to train on.
        problems: why training would refuse the data; empty if it would not.
        options: what must be added to ``--data.path`` to train on it.
        task: what the labels are for.
    """

    layout: str
    splits: dict[str, int]
    origin: str
    classes: dict[str, dict[str, int]]
    sizes: dict[str, int]
    channels: dict[str, int]
    unreadable: list[str]
    skipped: list[str]
    duplicates: Duplicates
    notes: list[str]
    survey: Survey | None
    problems: list[str]
    options: list[str]
    task: str = "classification"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        tree = dataclasses.asdict(self)
        for key in ("shared", "near_shared"):
            tree["duplicates"][key] = {
                " in ".join(pair): count for pair, count in getattr(self.duplicates, key).items()
            }
        return tree


@dataclasses.dataclass
class _Looked:
    """What decoding one split has shown; ``small`` are copies of at most 64 pixels a side."""

    rows: list[int] = dataclasses.field(default_factory=list)
    small: list[np.ndarray] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)


def inspect(data: InMemoryDataset) -> tuple[DataReport, bytes]:
    """Return what the data set holds, and a contact sheet as PNG.

    Raises:
        UserError: nothing can be read at all: there is no such path, no known layout, or no image that can be decoded.
    """
    raw = data.read()
    raw = data.selected(raw)
    problems: list[str] = []
    raw, order = _with_classes(data, raw, problems)
    try:
        raw, origin = assign_splits(data.grouped(raw), training=True)
        check(raw, limit_train=data.limit_train)
    except UserError as error:
        problems += error.problems
        origin = "test" if len(raw.test.labels) else ""
    if raw.val is None and len(raw.train.labels) and not problems:
        raw = _with_validation(data, raw)
    parts = {name: split for name, split in raw.parts.items() if len(split.labels)}
    sizes: Counter[str] = Counter()
    channels: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    unreadable: list[str] = []
    looked = {
        name: _look(split, data.background, sizes, channels, remarks, unreadable) for name, split in parts.items()
    }
    if not sizes:
        raise UserError(*(unreadable[:5] or ["there is no image; check --data.path"]))
    duplicates, missing = _duplicates(parts, looked)
    sample = _training_sample(raw, looked)
    summary = None if sample is None else summarise(data, raw, origin, sizes, sample, duplicates, unreadable)
    options = _options(data, summary, sizes, unreadable, problems)
    notes = [*raw.notes, *order, *say_remarks(remarks, data.background), *duplicates.notes(), *missing]
    report = DataReport(
        _layout(data),
        {name: len(split.labels) for name, split in parts.items()},
        origin,
        _class_counts(raw, parts),
        dict(sizes.most_common()),
        dict(channels),
        unreadable,
        list(raw.skipped),
        duplicates,
        notes,
        summary,
        problems,
        options,
        fitting_tasks(raw.train.labels if len(raw.train.labels) else raw.test.labels),
    )
    return report, _contact_sheet(raw.classes, parts, looked)


def _layout(data: InMemoryDataset) -> str:
    """Return the layout that is recognised at a path, or the name of the data set."""
    if not isinstance(data, Auto):
        return type(data).__name__.lower()
    path = resolve_path(data.path)
    return min((reader.rank, reader.layout) for _, reader in READERS.items() if recognizes(reader, path))[1]


def _with_classes(data: InMemoryDataset, raw: RawSplits, problems: list[str]) -> tuple[RawSplits, tuple[str, ...]]:
    """Return the data with labels as ``data.classes`` numbers them."""
    if data.classes is None:
        return raw, ()
    try:
        order = renumber(raw, data.classes)
    except UserError as error:
        problems += error.problems
        return raw, ()
    changed: dict[str, Any] = {
        name: dataclasses.replace(split, labels=order(split.labels)) for name, split in raw.parts.items()
    }
    return raw._replace(**changed, classes=order.classes), order.notes


def _with_validation(data: InMemoryDataset, raw: RawSplits) -> RawSplits:
    """Return the data with the validation images that training with seed 0 would cut."""
    labels = raw.train.labels
    try:
        chosen, rest = cut(labels, data.groups_of(raw.train), round(data.val_fraction * len(labels)), 0)
    except UserError:
        return raw
    note = f"the validation images are cut from the training images (data.val_fraction {data.val_fraction:g}), here with seed 0"
    return raw._replace(train=raw.train.subset(rest), val=raw.train.subset(chosen), notes=(*raw.notes, note))


def _look(
    split: RawSplit,
    background: str,
    sizes: Counter[str],
    channels: Counter[str],
    remarks: Counter[str],
    unreadable: list[str],
) -> _Looked:
    looked = _Looked()
    for row, array in enumerate(_arrays(split, background, remarks, unreadable)):
        if array is None:
            continue
        sizes[f"{array.shape[1]}x{array.shape[0]}"] += 1
        channels["grey" if array.ndim == 2 else "colour"] += 1
        looked.rows.append(row)
        looked.digests.append(digest(array))
        looked.small.append(_shrunken(array))
    return looked


def _arrays(
    split: RawSplit, background: str, remarks: Counter[str], unreadable: list[str]
) -> Iterator[np.ndarray | None]:
    """Yield the images, (H, W) or (H, W, 3), and None for one that cannot be decoded."""
    images = split.images
    if isinstance(images, Tensor):
        yield from (image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy() for image in images)
        return
    fit = ResizeSpec(background=background)

    def one(row: int) -> np.ndarray | str:
        try:
            return decode_one(images[row], split.names[row] if split.names else f"image {row}", fit, remarks)
        except UserError as error:
            return str(error)

    Image.init()
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), _CHUNK):
            for result in pool.map(one, range(start, min(start + _CHUNK, len(images)))):
                if isinstance(result, str):
                    unreadable.append(result)
                yield None if isinstance(result, str) else result


def _shrunken(array: np.ndarray) -> np.ndarray:
    if max(array.shape[:2]) <= _SMALL:
        return np.ascontiguousarray(array)
    image = Image.fromarray(np.ascontiguousarray(array))
    return np.asarray(image.resize((min(_SMALL, image.width), min(_SMALL, image.height)), Image.Resampling.BILINEAR))


def _duplicates(parts: dict[str, RawSplit], looked: dict[str, _Looked]) -> tuple[Duplicates, list[str]]:
    splits = {}
    for name, subset in parts.items():
        rows = looked[name].rows
        names = [subset.names[row] for row in rows] if subset.names else ()
        if rows:
            labels = [hash(subset.labels[row].numpy().tobytes()) for row in rows]  # of masks and several labels, too
            splits[TITLES[name]] = Split(looked[name].small, labels, names, looked[name].digests)
    total = sum(len(split.images) for split in splits.values())
    if total > NEAR:
        note = f"nearly equal images are not looked for: {total} images are more than {NEAR}; use --data.limit_train"
        return find_duplicates(splits, near=False), [note]
    try:
        return find_duplicates(splits), []
    except MissingExtra as error:
        return find_duplicates(splits, near=False), [str(error)]


def _training_sample(raw: RawSplits, looked: dict[str, _Looked]) -> tuple[list[np.ndarray], Tensor] | None:
    """Return some training images of each class and their rows; None if there are none, or labels that are not a class each."""
    train = looked.get("train", _Looked())
    rows = torch.tensor(train.rows, dtype=torch.int64)
    if (
        not len(rows)
        or raw.train.labels.dim() > 1
        or not 0 <= int(raw.train.labels.min()) <= int(raw.train.labels.max()) < len(raw.classes)
    ):
        return None
    chosen = stratified(raw.train.labels[rows], min(SAMPLE, len(rows)), 0, spare=0)[0]
    return at(train.small, chosen), rows[chosen]


def _options(
    data: InMemoryDataset, summary: Survey | None, sizes: Counter[str], unreadable: list[str], problems: list[str]
) -> list[str]:
    """Return what training needs besides the path; adds to ``problems`` what it would refuse without."""
    options = []
    if len(sizes) > 1 and data.image_size is None:
        fitting = (64,) if summary is None else summary.image_sizes
        options += ["--data.image_size", str(max(side for side in fitting if side <= max(64, fitting[0])))]
        problems.append(f"images have {len(sizes)} sizes; add {' '.join(options)} to resize them all")
    if unreadable and not data.skip_unreadable:
        options += ["--data.skip_unreadable", "true"]
        problems.append(f"{len(unreadable)} images cannot be read; add --data.skip_unreadable true, or replace them")
    return options


def _class_counts(raw: RawSplits, parts: dict[str, RawSplit]) -> dict[str, dict[str, int]]:
    most = len(raw.classes) - 1
    labels = {
        name: each.labels if each.labels.dim() > 1 else each.labels.clamp(0, most) for name, each in parts.items()
    }
    members = {name: _members(each, len(raw.classes)) for name, each in labels.items()}
    return {each: {name: len(members[name][k]) for name in parts} for k, each in enumerate(raw.classes)}


def _members(labels: Tensor, num_classes: int) -> list[list[int]]:
    """Return the images of each class: of masks those with a pixel of it, of several labels those that have it."""
    columns = (
        labels.T == 1
        if labels.dim() == 2
        else ((labels == k).reshape(len(labels), -1).any(1) for k in range(num_classes))
    )
    return [column.nonzero()[:, 0].tolist() for column in columns]


def _contact_sheet(classes: tuple[str, ...], parts: dict[str, RawSplit], looked: dict[str, _Looked]) -> bytes:
    """Return a PNG: one line per class with its name and its first images."""
    by_class: dict[int, list[np.ndarray]] = {}
    for name, split in parts.items():
        small = dict(zip(looked[name].rows, looked[name].small, strict=True))
        for k, rows in enumerate(_members(split.labels, len(classes))):
            images = [small[row] for row in rows if row in small]
            by_class[k] = [*by_class.get(k, []), *images][:_SHOWN_IMAGES]
    labels = [k for k, images in by_class.items() if images][:_SHOWN_CLASSES]
    cell = _SMALL + 4
    sheet = Image.new("RGB", (_CAPTION + _SHOWN_IMAGES * cell, max(1, len(labels)) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for line, label in enumerate(labels):
        text = f"{label} {classes[label]}"
        draw.text(
            (4, line * cell + cell // 2 - 6), text.encode("latin-1", "replace").decode("latin-1")[:18], fill="black"
        )
        for column, array in enumerate(by_class[label]):
            image = Image.fromarray(array).convert("RGB")
            factor = max(1, _SMALL // max(image.size))
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            sheet.paste(image, (_CAPTION + column * cell, line * cell + 2))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
