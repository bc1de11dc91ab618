"""CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich 2019) and MNIST-C (Mu and Gilmer 2019): images that came corrupted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clead.data.base import RawSplit, RawSplits
from clead.data.bounded import map_npy
from clead.data.classes import number_labels
from clead.data.datasets import READERS, Reader
from clead.data.datasets.cifar_files import CLASSES
from clead.errors import UserError

_LABELS = "labels.npy"
_SEVERITIES = 5
_PUBLISHED = """gaussian_noise shot_noise impulse_noise speckle_noise defocus_blur glass_blur motion_blur zoom_blur gaussian_blur
snow frost fog brightness contrast elastic_transform pixelate jpeg_compression spatter saturate"""
_CORRUPTIONS = frozenset(_PUBLISHED.split())
_CIFAR_FOLDERS, _MNIST_FOLDERS = ("CIFAR-10-C", "CIFAR-100-C"), ("mnist_c", "MNIST-C")


class Corrupted(NamedTuple):
    """The images of one corruption, and their labels."""

    corruption: str
    images: Path
    labels: Path


def cifar_files(path: Path) -> list[Corrupted]:
    """Return the files CORRUPTION.npy of a folder with labels.npy, or of the one published so in it, or the file ``path``."""
    folder = path.parent if path.is_file() else path
    inside = [] if path.is_file() else [path / name for name in _CIFAR_FOLDERS]
    folder = next((each for each in (*inside, folder) if (each / _LABELS).is_file()), None)
    if folder is None or (path.is_file() and (path.suffix != ".npy" or path.name == _LABELS)):
        return []
    inside = sorted(folder.glob("*.npy"))
    if not _cifar(folder.name) and not any(file.stem in _CORRUPTIONS for file in inside):
        return []  # some other arrays
    files = [path] if path.is_file() else inside
    return [Corrupted(file.stem, file, folder / _LABELS) for file in files if file.name != _LABELS and file.is_file()]


def mnist_files(path: Path) -> list[Corrupted]:
    """Return the files CORRUPTION/test_images.npy of a folder, or of the one published so in it, or of a corruption."""
    if not path.is_dir():
        return []
    for folder in (*(path / name for name in _MNIST_FOLDERS), path):
        if folder.is_dir():
            inside = [folder, *sorted(each for each in folder.iterdir() if each.is_dir())]
            files = [Corrupted(each.name, each / "test_images.npy", each / "test_labels.npy") for each in inside]
            if files := [each for each in files if each.images.is_file() and each.labels.is_file()]:
                return files
    return []


def read_corrupted(files: list[Corrupted], *, repeated: bool) -> RawSplits:
    """Read images of one or more corruptions as test images, with the columns corruption and severity.

    Args:
        files: of one data set, at least one.
        repeated: whether a file may hold the same images at five severities, one after the other.

    Raises:
        UserError: a file is not as its header says, images are of several shapes, or labels are not one per image.
    """
    stored = [_images(each.images) for each in files]
    labels = [_labels(each.labels, len(images)) for each, images in zip(files, stored, strict=True)]
    if odd := [each for each, images in zip(files, stored, strict=True) if images.shape[1:] != stored[0].shape[1:]]:
        raise UserError(
            f"{odd[0].images}: the images have another shape than those of {files[0].images}; move it elsewhere"
        )
    together = np.empty((sum(map(len, stored)), *stored[0].shape[1:]), dtype=np.uint8)
    np.concatenate(stored, out=together)
    (numbered,), classes, notes = number_labels(np.concatenate(labels))
    severities = [severity for each in labels for severity in _severities(each, repeated)]
    columns = {"corruption": [each.corruption for each, images in zip(files, stored, strict=True) for _ in images]}
    if any(severities):
        columns["severity"] = severities
    test = RawSplit(torch.from_numpy(together), numbered, columns=columns)
    names, count = sorted({each.corruption for each in files}), len(numbered)
    kinds = f"{len(names)} corruptions ({', '.join(names)})" if len(names) > 1 else f"the corruption {names[0]}"
    levels = f" at severities {', '.join(sorted(set(severities)))}" if any(severities) else ""
    note = f"the {count} test images are corrupted by {kinds}{levels}"
    training = [each.images.with_name("train_images.npy") for each in files]
    return RawSplits(
        test=test,
        classes=_names(files[0].images.parent.name, classes),
        skipped=tuple(f"{file}: corrupted training images, which are not read" for file in training if file.is_file()),
        notes=(*notes, note),
        ordered=True,
    )


def _images(file: Path) -> np.ndarray:
    """Return (N, C, H, W) uint8, left on the disk."""
    array = map_npy(file)
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise UserError(
            f"{file} must hold images (N, H, W, C) of uint8 with C 1 or 3, got {array.dtype} {array.shape}; convert it, or move it "
            "elsewhere"
        )
    return array.transpose(0, 3, 1, 2)


def _labels(file: Path, count: int) -> np.ndarray:
    labels = map_npy(file)
    whole = labels.dtype.kind in "iu" and labels.ndim == 1 and len(labels) >= count and len(labels) % count == 0
    if not whole or (labels.reshape(-1, count) != labels[:count]).any():
        raise UserError(
            f"{file} must be {count} integers, one per image, got {labels.dtype} {labels.shape}; fetch both files again"
        )
    return np.array(labels[:count])


def _severities(labels: np.ndarray, repeated: bool) -> list[str]:
    """Return the severity of each image, 1 to 5 in blocks, or empty texts where the labels do not repeat five times."""
    size, rest = divmod(len(labels), _SEVERITIES)
    blocks = labels.reshape(_SEVERITIES, size) if repeated and size and not rest else np.empty((0, 0))
    if not len(blocks) or (blocks != blocks[0]).any():
        return [""] * len(labels)
    return [str(1 + row // size) for row in range(len(labels))]


def _cifar(folder: str) -> re.Match[str] | None:
    return re.match(r"cifar[-_]?(100?)[-_]?c", folder.lower())


def _names(folder: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return CIFAR's names where the folder is called as published, and it has as many classes."""
    match = _cifar(folder)
    names = CLASSES[f"cifar{match[1]}"] if match else ()
    return names if classes == tuple(map(str, range(len(names)))) else classes


def _register(name: str, layout: str, find: Callable[[Path], list[Corrupted]], *, repeated: bool) -> None:
    READERS.register(name)(
        Reader(
            layout,
            lambda path: bool(find(path)),
            lambda path: read_corrupted(find(path), repeated=repeated),
            rank=40,
            includes=("npy",),
        )
    )


_register("cifar_corrupted", "CIFAR-10-C/CORRUPTION.npy and labels.npy", cifar_files, repeated=True)
_MNIST_C = "mnist_c/CORRUPTION/test_images.npy and test_labels.npy"
_register("mnist_corrupted", _MNIST_C, mnist_files, repeated=False)
