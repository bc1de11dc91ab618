"""Auxiliary images: more images for training alone, with labels of their own, pseudo-labels, or none."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from clead.data.base import InMemoryDataset, RawSplit, read_files, resolve_path, say_left_out
from clead.data.classes import match_names
from clead.data.datasets import READERS
from clead.data.datasets.auto import read_any, recognizes
from clead.data.decoding import ResizeSpec, decode, fit_arrays, readable
from clead.data.duplicates import digests_of, equal_or_near
from clead.data.files import files_below, holds_image, is_image, visible_folders
from clead.errors import UserError, memory_of
from clead.interfaces import ImageSet, Splits

_KEY = "data.extra"


@memory_of("reading the auxiliary images", "data.image_size")
def with_extra(data: InMemoryDataset, splits: Splits) -> tuple[Splits, str]:
    """Return ``splits`` whose training images have the auxiliary images of ``data.extra``, and a note on them; "" without any.

    They are brought to the shape of the training images. Those that equal or nearly equal a validation or test image are left out.

    Raises:
        UserError: they cannot be read, have another shape or classes that the data do not know, or none is left.
    """
    if data.extra is None or splits.train.extra is not None:
        return splits, ""
    raw, classes, skipped = _read(data.extra)
    labels, labels_note = _labels(raw, classes, splits.classes, data)
    images, rows, unreadable = _decoded(raw, tuple(splits.train.images.shape[1:]), data)
    held_out = torch.cat([splits.val.images, splits.test.images])
    equal, near = equal_or_near(images, held_out)
    keep = ~(equal | near)
    if not keep.any():
        raise UserError(
            f"{_KEY}: all {len(images)} images of {data.extra} equal validation or test images; give other images"
        )
    images, labels = images[keep], labels[rows][keep]
    repeated = sum(map(set(digests_of(splits.train.images)).__contains__, digests_of(images)))
    left_out = int(equal.sum()), int(near.sum())
    texts = [
        f"{len(images)} auxiliary images of {data.extra} are {data.extra_share:.0%} of each training batch ({labels_note})"
    ]
    if any(left_out):
        texts.append(
            f"{left_out[0]} that equal and {left_out[1]} that nearly equal validation or test images are left out"
        )
    if repeated:
        texts.append(f"{repeated} equal training images")
    if skipped:
        texts.append(f"{skipped} files there are not read")
    if unreadable:
        texts.append(f"{unreadable} cannot be read and are left out")
    labelled = None if (labels >= 0).all() else labels >= 0
    extra = ImageSet(images, labels, labelled)
    digest = hashlib.sha256(images.contiguous().numpy())
    digest.update(labels.numpy())
    train = dataclasses.replace(splits.train, extra=extra, extra_share=data.extra_share)
    return dataclasses.replace(splits, train=train, extra_fingerprint=digest.hexdigest()), "; ".join(texts)


def _read(path: Path) -> tuple[RawSplit, tuple[str, ...], int]:
    """Return the images, of the training split where there are splits, the class names, and how many files are not read.

    A folder that holds images and fewer than two folders with images has no classes.
    """
    try:
        path = resolve_path(path)
        if path.is_dir() and any(map(is_image, path.iterdir())) and not _has_labels(path):
            reasons = dict(files_below(path, set()))
            files = [file for file, reason in reasons.items() if reason is None]
            return read_files(files, torch.full((len(files),), -1)), (), len(reasons) - len(files)
        raw = read_any(path)
    except UserError as error:
        raise UserError(*(problem.replace("data.path", _KEY) for problem in error.problems)) from None
    chosen = next((split for split in raw.parts.values() if len(split.labels)), None)
    if chosen is None:
        raise UserError(f"{_KEY} must hold images, got none in {str(path)!r}; give another path")
    return chosen, raw.classes, len(raw.skipped)


def _has_labels(path: Path) -> bool:
    """Say whether something in a folder with images, class folders or a table, tells their classes."""
    if sum(map(holds_image, visible_folders(path))) > 1:
        return True
    return any(name != "folder" and recognizes(reader, path) for name, reader in READERS.items())


def _labels(
    raw: RawSplit, classes: tuple[str, ...], known: tuple[str, ...], data: InMemoryDataset
) -> tuple[Tensor, str]:
    """Return the labels as the data number the classes, −1 where there is none, and a note on them."""
    source = data.pseudo_labels_from
    unlabelled = torch.full((len(raw.labels),), -1)
    if not classes:
        return unlabelled, "without labels" if source is None else f"labelled by {source}"
    counts = torch.bincount(raw.labels, minlength=len(classes)).tolist()
    filled = [name for name, count in zip(classes, counts, strict=True) if count]
    numbers, _ = match_names(filled, [(name,) for name in known])
    note = "with their own labels"
    if not numbers and list(classes) == [str(k) for k in range(len(classes))] and len(classes) == len(known):
        numbers, note = {name: int(name) for name in filled}, "with their own labels, label k taken for class k"
    if lacking := [name for name in filled if name not in numbers]:
        if source is not None:
            return unlabelled, f"labelled by {source}"
        shown = ", ".join(map(repr, lacking[:5])) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise UserError(
            f"{_KEY} may have the classes of the data ({', '.join(map(repr, known[:3]))}, …), got {shown}; rename them, or let a "
            "model label the images: --data.pseudo_labels_from RUN"
        )
    if source is not None and data.labelled == 1:
        raise UserError(
            f"data.pseudo_labels_from: every image has a label, those of {_KEY} too, got {source}; leave it out, or give the "
            "images without their class folders"
        )
    return torch.tensor([numbers.get(name, -1) for name in classes])[raw.labels], note


def _decoded(raw: RawSplit, shape: tuple[int, ...], data: InMemoryDataset) -> tuple[Tensor, Tensor, int]:
    """Return the images in the shape of the data's, their rows in ``raw``, and how many cannot be read."""
    channels, height, width = shape
    fit = ResizeSpec(height if height == width else None, data.resize, 1 if channels == 1 else 3, data.background)
    rows, images = torch.arange(len(raw.labels)), raw.images
    if not isinstance(images, Tensor):
        names = list(raw.names) or [f"image {row}" for row in range(len(images))]
        if data.skip_unreadable:
            rows = torch.tensor(readable(images, names, fit), dtype=torch.bool).nonzero()[:, 0]
            if bad := sorted(set(range(len(images))) - set(rows.tolist())):
                say_left_out([names[row] for row in bad], len(images))
        chosen = rows.tolist()
        decoded = decode([images[row] for row in chosen], [names[row] for row in chosen], fit, remarks=Counter())
    else:
        decoded = fit_arrays(images, fit)
    if tuple(decoded.shape[1:]) != shape:
        got = "x".join(map(str, decoded.shape[1:]))
        raise UserError(
            f"{_KEY}: images must be {'x'.join(map(str, shape))} (channels x height x width) as those of the data, got {got}; set "
            "--data.image_size to resize all of them"
        )
    return decoded, rows, len(raw.labels) - len(rows)
