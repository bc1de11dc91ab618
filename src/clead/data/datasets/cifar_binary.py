"""CIFAR-10 and CIFAR-100 as their binary version is unpacked; a data folder of torchvision may hold them beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clead.data.base import RawSplit, RawSplits, no_images
from clead.data.bounded import read_file
from clead.data.datasets import READERS, Reader
from clead.errors import UserError

_PIXELS = 3 * 32 * 32


class Files(NamedTuple):
    """The files of one CIFAR; each record is ``label_bytes`` labels, of which the last counts, and 3·32·32 pixels."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    classes: int
    label_bytes: int


FILES = {
    "cifar10": Files(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        10,
        1,
    ),
    "cifar100": Files("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 100, 2),
}


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
CLASSES = {"cifar10": tuple(_CIFAR10.split()), "cifar100": tuple(_CIFAR100.split())}
"""The published names, for copies that lack theirs."""


def folder_of(path: Path, name: str, needed: Sequence[str]) -> Path | None:
    """Return ``path``, or the folder called ``name`` in it, if it holds one of the files ``needed``."""
    return next((each for each in (path / name, path) if any((each / file).is_file() for file in needed)), None)


def present(folder: Path, train: Sequence[str], test: str) -> tuple[list[str], list[str]]:
    """Return the training and test files that are there; UserError if a part of the training files is missing."""
    missing = [file for file in train if not (folder / file).is_file()]
    if missing and len(missing) < len(train):
        raise UserError(
            f"{folder} must hold {', '.join(train)}, lacks {', '.join(missing)}; unpack the archive again, or remove the "
            "others to evaluate on the test images only"
        )
    return [] if missing else list(train), [test] if (folder / test).is_file() else []


def parse_records(content: bytes, label_bytes: int, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images, (N, 3, 32, 32) uint8, and labels, (N,) uint8; UserError if bytes are left over."""
    size = label_bytes + _PIXELS
    if len(content) % size or not content:
        raise UserError(
            f"{file} must be records of {size} bytes ({label_bytes} label, {_PIXELS} pixels), got {len(content)} bytes; "
            "unpack the archive again"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


def read_cifar_binary(path: Path, name: str) -> RawSplits:
    """Read the folder or the one called as unpacked in it; raises UserError if a file is missing or has another size."""
    files = FILES[name]
    folder = folder_of(path, files.folder, (*files.train, files.test))
    if folder is None:
        raise UserError(f"{path} must hold {files.folder}/{files.test}; unpack the archive there")
    parts = []
    for present_files in present(folder, files.train, files.test):
        if not present_files:
            parts.append(no_images())
            continue
        content = [parse_records(read_file(folder / file), files.label_bytes, folder / file) for file in present_files]
        images, labels = (np.concatenate(each) for each in zip(*content, strict=True))
        parts.append(RawSplit(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))))
    names = folder / files.names
    classes = read_file(names).decode(errors="replace").split() if names.is_file() else []
    return named(parts[0], parts[1], classes, names, name)


def named(train: RawSplit, test: RawSplit, classes: Sequence[str], file: Path, name: str) -> RawSplits:
    """Return the parts with the names in ``file``, else the published ones; UserError if it names another number of classes."""
    if classes and len(classes) != FILES[name].classes:
        raise UserError(f"{file} must name {FILES[name].classes} classes, got {len(classes)}; unpack the archive again")
    return RawSplits(train, test, tuple(classes) or CLASSES[name], ordered=True)


def _register(name: str, files: Files) -> None:
    READERS.register(f"{name}_binary")(
        Reader(
            f"{files.folder}/{files.test}",
            lambda path: folder_of(path, files.folder, (files.test, *files.train)) is not None,
            lambda path: read_cifar_binary(path, name),
            rank=20 if name == "cifar10" else 22,
            dataset=name,
        )
    )


for _name, _files in FILES.items():
    _register(_name, _files)
