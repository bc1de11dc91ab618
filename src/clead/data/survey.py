"""What a data set holds, in the numbers by which a training is planned, without decoding more than a sample of it."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from clead.data.base import InMemoryDataset, RawSplit, RawSplits, assign_splits, at, check, renumber
from clead.data.decoding import FORMATS, ResizeSpec, decode_one
from clead.data.duplicates import Duplicates, Split, digest, digests_of, find_duplicates
from clead.data.flips import SAMPLE, Flips, look_at_flips
from clead.data.label_sampling import stratified
from clead.errors import UserError, first_line
from clead.tasks import fitting_tasks

TITLES = {"train": "training", "val": "validation", "test": "test"}
_SIDES = (16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_QUARTER = 0.25  # of the images may be enlarged
_ENOUGH = 64  # pixels a side of the sample
_PIXELS, _FEWEST = 1_000_000_000, 400  # that are decoded for the sample, and images of it at least


@dataclasses.dataclass(frozen=True)
class Survey:
    """What ``survey`` has counted.

    Args:
        images: split -> number of images: ``train``, ``val`` (if the data have validation images of their own) and ``test``.
        origin: where the test images come from, as ``clead.interfaces.Splits.origin``.
        counts: class name -> number of training images, in the order of the class numbers.
        sides: smallest, median and largest shorter side of the images as they are stored, in pixels.
        image_sizes: values of ``data.image_size``, ascending, that enlarge at most a quarter of the images.
        one_size: whether all images have one size, so that ``data.image_size`` may be left out.
        channels: 1 if every image that was decoded is grey, else 3.
        groups: groups of training images (``data.group_by``), or None.
        repeats: how many images are there twice: ``"training"`` inside a split, ``"test in training"`` across splits.
        unreadable: one line per image that cannot be read, as far as that was looked at.
        flips: whether training may mirror images.
        notes: what must be known of the data, one sentence each.
    """

    images: Mapping[str, int]
    origin: str
    counts: Mapping[str, int]
    sides: tuple[int, int, int]
    image_sizes: tuple[int, ...]
    one_size: bool
    channels: Literal[1, 3]
    groups: int | None
    repeats: Mapping[str, int]
    unreadable: tuple[str, ...]
    flips: Flips
    notes: tuple[str, ...] = ()

    @property
    def balance(self) -> float:
        """Training images of the largest class for each of the smallest one that has any."""
        present = [count for count in self.counts.values() if count]
        return max(present) / min(present)

    def sentences(self) -> list[str]:
        """Return what a plan rests on, in words."""
        present = {name: count for name, count in self.counts.items() if count}
        largest, smallest = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        balance = f"{present[largest]} training images in every class"
        if self.balance > 1:
            counts = f"{present[smallest]} ({smallest}) to {present[largest]} ({largest})"
            balance = f"{counts} training images per class, {self.balance:.1f} times as many"
        lines = [
            f"balance: {balance}",
            f"data.image_size without enlarging: {', '.join(map(str, self.image_sizes))}",
            f"mirroring looks {'safe (data.augment.flip)' if self.flips.safe else 'unsafe'}: {self.flips.reason}",
        ]
        return lines if self.groups is None else [*lines, f"groups: {self.groups} of training images (data.group_by)"]


def survey(data: InMemoryDataset) -> Survey:
    """Return what the data hold; 60,000 small images take some seconds.

    Sizes are read of all images, equality is that of files, and ``flips.SAMPLE`` training images are decoded; what only decoding
    all shows (nearly equal images, files that are cut off) is noted by ``load``.

    Raises:
        UserError: there is no such path or no known layout, or training would refuse the labels or classes.
    """
    raw = data.read()
    raw, origin = assign_splits(data.grouped(data.selected(raw)), training=True)
    check(raw, limit_train=data.limit_train)
    if (task := fitting_tasks(raw.train.labels)) != "classification":
        raise UserError(
            f"clead harden plans for one class per image, got data for the task {task}; give clead train a recipe and --task {task}"
        )
    if data.classes is not None:
        order = renumber(raw, data.classes)
        train = dataclasses.replace(raw.train, labels=order(raw.train.labels))
        raw = raw._replace(train=train, classes=order.classes, notes=(*raw.notes, *order.notes))
    unreadable: list[str] = []
    parts = {name: split for name, split in raw.parts.items() if len(split.labels)}
    sizes = Counter(size for split in parts.values() for size in _sizes(split, unreadable))
    sample = _sample(raw.train, data.background, unreadable, _affordable(sizes))
    if not sample[0]:
        raise UserError(*(unreadable[:5] or ["there is no image; check --data.path"]))
    splits = {TITLES[name]: Split((), split.labels.tolist(), (), _digests(split)) for name, split in parts.items()}
    duplicates = find_duplicates(splits, near=False)
    return summarise(data, raw, origin, sizes, sample, duplicates, list(dict.fromkeys(unreadable)))


def summarise(
    data: InMemoryDataset,
    raw: RawSplits,
    origin: str,
    sizes: Mapping[str, int],
    sample: tuple[Sequence[np.ndarray], Tensor],
    duplicates: Duplicates,
    unreadable: Sequence[str],
) -> Survey:
    """Return the survey of data of which this is known.

    Args:
        data: its settings.
        raw: its splits; labels are numbered as ``raw.classes`` are.
        origin: where the test images come from.
        sizes: ``"WIDTHxHEIGHT"`` -> number of images.
        sample: some training images, decoded and perhaps shrunken, and their rows in ``raw.train``, (n,) int64.
        duplicates: images that are there twice.
        unreadable: one line per image that cannot be read.
    """
    arrays, rows = sample
    labels, groups = raw.train.labels, data.groups_of(raw.train)
    sides, fitting = sides_of([min(map(int, size.split("x"))) for size, count in sizes.items() for _ in range(count)])
    return Survey(
        {name: len(split.labels) for name, split in raw.parts.items() if len(split.labels)},
        origin,
        dict(zip(raw.classes, torch.bincount(labels, minlength=len(raw.classes)).tolist(), strict=True)),
        sides,
        fitting,
        one_size=len(sizes) == 1,
        channels=data.channels or (1 if all(array.ndim == 2 for array in arrays) else 3),
        groups=None if groups is None else len(set(groups)),
        repeats=repeats_of(duplicates),
        unreadable=tuple(unreadable),
        flips=look_at_flips(arrays, labels[rows], raw.classes, at(groups, rows) if groups else None),
        notes=raw.notes,
    )


def sides_of(sides: Sequence[int]) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Return smallest, median and largest of the images' shorter sides, and the sides to which they can be resized.

    >>> sides_of([30, 40, 60, 60, 300])
    ((30, 60, 300), (16, 24, 32))
    """
    ordered = sorted(sides)
    low = ordered[int(_QUARTER * len(ordered))]
    fitting = {side for side in _SIDES if side <= low}
    if not fitting or (ordered[0] == ordered[-1] and low < _SIDES[-1]):
        fitting.add(low)
    return (ordered[0], ordered[len(ordered) // 2], ordered[-1]), tuple(sorted(fitting))


def repeats_of(duplicates: Duplicates) -> dict[str, int]:
    """Return how many images are there twice, inside a split and across splits; what is 0 is left out."""
    across = {f"{later} in {earlier}": count for (later, earlier), count in duplicates.shared.items()}
    return {name: count for name, count in {**duplicates.within, **across}.items() if count}


def _sizes(split: RawSplit, unreadable: list[str]) -> list[str]:
    """Return width and height of the upright images, by their headers; adds those that have none to ``unreadable``."""
    if isinstance(split.images, Tensor):
        height, width = split.images.shape[2:]
        return [f"{width}x{height}"] * len(split.images)
    sizes = []
    for row, blob in enumerate(split.images):
        try:
            image = Image.open(io.BytesIO(blob), formats=FORMATS)
            # Other formats would decode the whole image to look for EXIF that comes behind it.
            tells = image.format in ("JPEG", "TIFF", "WEBP") or "exif" in image.info
            lies = tells and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            width, height = image.size[::-1] if lies else image.size
            sizes.append(f"{width}x{height}")
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
            unreadable.append(f"{_name(split, row)}: not a readable image ({first_line(error)})")
    return sizes


def _affordable(sizes: Mapping[str, int]) -> int:
    """Return how many images of these sizes are decoded within seconds."""
    pixels = sum(count * math.prod(map(int, size.split("x"))) for size, count in sizes.items())
    return min(SAMPLE, max(_FEWEST, _PIXELS * sum(sizes.values()) // max(1, pixels)))


def _sample(split: RawSplit, background: str, unreadable: list[str], count: int) -> tuple[list[np.ndarray], Tensor]:
    """Return about ``count`` images, some of each class, decoded, perhaps smaller than they are, and their rows, (n,) int64."""
    rows = stratified(split.labels, min(count, len(split.labels)), 0, spare=0)[0]
    if isinstance(split.images, Tensor):
        return [
            image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy() for image in split.images[rows]
        ], rows
    images, known = split.images, {line.partition(": ")[0] for line in unreadable}
    wanted = [row for row in rows.tolist() if _name(split, row) not in known]

    def one(row: int) -> np.ndarray | str:
        try:
            return decode_one(images[row], _name(split, row), ResizeSpec(background=background), enough=_ENOUGH)
        except UserError as error:
            return str(error)

    Image.init()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = dict(zip(wanted, pool.map(one, wanted), strict=True))
    unreadable += [text for text in decoded.values() if isinstance(text, str)]
    good = {row: array for row, array in decoded.items() if not isinstance(array, str)}
    return list(good.values()), torch.tensor(list(good), dtype=torch.int64)


def _digests(split: RawSplit) -> list[bytes]:
    if isinstance(split.images, Tensor):
        return digests_of(split.images)
    return [digest(np.frombuffer(blob, np.uint8)) for blob in split.images]


def _name(split: RawSplit, row: int) -> str:
    return split.names[row] if split.names else f"image {row}"
