"""MNIST's file format, IDX, in which MNIST, Fashion-MNIST, KMNIST and EMNIST are published and torchvision keeps them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clead.data.base import RawSplit, RawSplits
from clead.data.bounded import read_file, read_gzip
from clead.data.classes import number_labels
from clead.data.datasets import READERS, Reader
from clead.errors import UserError

_IMAGES = re.compile(r"(?P<prefix>.*?)(?P<part>train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_FOLDERS = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist", "KMNIST": "kmnist", "EMNIST": "emnist"}
_INSIDE = ("raw", "gzip")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_IMAGE_MAGIC, _LABEL_MAGIC = 2051, 2049


def folder_of(path: Path, names: tuple[str, ...]) -> Path | None:
    """Return the folder that holds the files: ``path``, raw/ or gzip/ in it, or in one of ``names`` in it."""
    inside = [*(path / name for name in names), path]
    for folder in [each for base in inside for each in (base, *(base / name for name in _INSIDE))]:
        if folder.is_dir() and any(_IMAGES.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder
    return None


def read_idx(path: Path, *names: str) -> RawSplits:
    """Read a folder of IDX files, or a file of images, whose set is read then.

    Raises:
        UserError: several sets lie there, labels are missing, or a file is not as its header says.
    """
    folder = path.parent if path.is_file() else folder_of(path, names)
    if folder is None:
        raise UserError(f"{path} must hold train-images-idx3-ubyte or its .gz; check --data.path")
    matches = [match for entry in sorted(folder.iterdir()) if (match := _IMAGES.fullmatch(entry.name))]
    sets = sorted({match["prefix"] for match in matches})
    if path.is_file():
        match = _IMAGES.fullmatch(path.name)
        sets = [match["prefix"]] if match else []
    if len(sets) != 1:
        first = next((match[0] for match in matches if match["prefix"] == sets[0]), "") if sets else ""
        raise UserError(
            f"{folder} holds {len(sets)} sets of images ({', '.join(each.rstrip('-') or 'no prefix' for each in sets)}); give one "
            f"of them: --data.path {folder / first}"
        )
    files: dict[str, str] = {}
    for match in matches:  # in order of names: an unpacked file comes before its .gz
        if match["prefix"] == sets[0]:
            files.setdefault("train" if match["part"] == "train" else "test", match[0])
    images, labels = {}, {}
    for split, file in files.items():
        images[split], labels[split] = _part(folder, file)
    numbered, classes, notes = number_labels(*labels.values())
    named, named_notes = _named(folder, sets[0], classes)
    parts: dict[str, Any] = {
        split: RawSplit(images[split], label) for split, label in zip(labels, numbered, strict=True)
    }
    return RawSplits(**parts, classes=named, notes=(*notes, *named_notes), ordered=True)


def _part(folder: Path, file: str) -> tuple[torch.Tensor, np.ndarray]:
    """Return images, (N, 1, H, W) uint8, and labels, (N,) uint8."""
    stem = re.sub(r"images([-.])idx3-ubyte(\.gz)?$", r"labels\1idx1-ubyte", file)
    label_file = next((name for name in (stem, f"{stem}.gz") if (folder / name).is_file()), None)
    if label_file is None:
        raise UserError(f"{folder / file}: its labels must lie beside it as {stem} or {stem}.gz; fetch them, too")
    images = _array(folder / file, _IMAGE_MAGIC, 3)
    labels = _array(folder / label_file, _LABEL_MAGIC, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{folder / file} has {len(images)} images and {label_file} {len(labels)} labels; fetch both files again"
        )
    return torch.from_numpy(images[:, None].copy()), labels


def _array(file: Path, magic: int, dimensions: int) -> np.ndarray:
    """Return the uint8 values of a file whose header is ``magic`` and the sides, 4 bytes each, big-endian."""
    content = read_gzip(file) if file.suffix == ".gz" else read_file(file)
    header = (
        np.frombuffer(content[: 4 * (dimensions + 1)], dtype=">u4") if len(content) >= 4 * (dimensions + 1) else [0]
    )
    if header[0] != magic:
        raise UserError(
            f"{file} must begin with {magic}, as IDX files of uint8 with {dimensions} dimensions do, got {int(header[0])}; "
            "fetch it again"
        )
    shape = tuple(map(int, header[1:]))
    size = math.prod(shape) + 4 * (dimensions + 1)
    if size != len(content) or 0 in shape:
        raise UserError(
            f"{file}: the header says {' x '.join(map(str, shape))} values, {size} bytes with it, got {len(content)}; "
            "fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=4 * (dimensions + 1)).reshape(shape)


def _named(folder: Path, prefix: str, classes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the readable names of the classes, where they are known, and notes."""
    parents = {folder.name, folder.parent.name}
    if "FashionMNIST" in parents and len(classes) == len(_CLOTHES):
        return _CLOTHES, ()
    mapping = folder / f"{prefix}mapping.txt"
    if not prefix.startswith("emnist-"):
        return classes, ()
    note = "EMNIST's images lie transposed in its files, and are read so, as torchvision does"
    if not mapping.is_file():
        return classes, (note,)
    rows = [line.split() for line in read_file(mapping).decode(errors="replace").splitlines() if line.strip()]
    if any(len(row) < 2 or not all(re.fullmatch("[0-9]{1,6}", word) for word in row) for row in rows):
        raise UserError(f"{mapping} must hold a label and character codes in each line; fetch it again")
    characters = {row[0]: chr(int(row[1])) for row in rows}
    return tuple(characters.get(name, name) for name in classes), (note,)


def _is_in(path: Path, name: str) -> bool:
    """Say whether the folder called ``name`` is ``path``, holds it (in raw/, or a file in it), or lies in it; and has the files."""
    if path.is_file():
        return _IMAGES.fullmatch(path.name) is not None and _is_in(path.parent, name)
    folders = [path / name, path, *([path.parent] if path.name in _INSIDE else [])]
    return any(folder.name == name and folder_of(folder, ()) is not None for folder in folders)


def _register(name: str, dataset: str) -> None:
    READERS.register(dataset)(
        Reader(
            f"{name}/raw/train-images-idx3-ubyte",
            lambda path: _is_in(path, name),
            lambda path: read_idx(path, name),
            rank=31,
            dataset=dataset,
        )
    )


def _recognizes(path: Path) -> bool:
    if any(_is_in(path, name) for name in _FOLDERS):
        return False
    return _IMAGES.fullmatch(path.name) is not None if path.is_file() else folder_of(path, ()) is not None


for _name, _dataset in _FOLDERS.items():
    _register(_name, _dataset)
READERS.register("idx")(Reader("train-images-idx3-ubyte and t10k-images-idx3-ubyte", _recognizes, read_idx, rank=30))
