"""Tiny-ImageNet as unpacked: training images one folder deeper, validation images listed in a file, test images unlabelled."""

from __future__ import annotations

from pathlib import Path

import torch

from clead.data.base import RawSplit, RawSplits, read_files
from clead.data.bounded import read_file
from clead.data.datasets import READERS, Reader
from clead.errors import UserError

_FOLDER, _ANNOTATIONS = "tiny-imagenet-200", "val_annotations.txt"
_EXTENSIONS = (".jpeg", ".jpg", ".png")


def _root(path: Path) -> Path | None:
    """Return ``path`` or the folder called as unpacked in it, if it has the list of validation images."""
    return next((each for each in (path / _FOLDER, path) if (each / "val" / _ANNOTATIONS).is_file()), None)


def read_tiny_imagenet(path: Path) -> RawSplits:
    """Read train/WNID/images/ and val/images/; classes in the order of wnids.txt, called as words.txt says, where they are there.

    Raises:
        UserError: a listed image is missing, or its class unknown.
    """
    root = _root(path)
    if root is None:
        raise UserError(f"{path} must hold val/{_ANNOTATIONS}, as Tiny-ImageNet does when unpacked; check --data.path")
    folders = (
        sorted(each.name for each in (root / "train").iterdir() if each.is_dir()) if (root / "train").is_dir() else []
    )
    rows = [line.split("\t") for line in _lines(root / "val" / _ANNOTATIONS)]
    if any(len(row) < 2 for row in rows):
        raise UserError(
            f"{root / 'val' / _ANNOTATIONS} must hold a file name and a class in each line; unpack it again"
        )
    listed = [line.strip() for line in _lines(root / "wnids.txt")] if (root / "wnids.txt").is_file() else []
    wnids = list(dict.fromkeys(listed or folders or sorted({row[1] for row in rows})))
    number = {wnid: k for k, wnid in enumerate(wnids)}
    if unknown := [wnid for wnid in [*folders, *(row[1] for row in rows)] if wnid not in number]:
        where = "wnids.txt" if listed else "train/"
        raise UserError(
            f"{root}: the class {unknown[0]!r} is not in {where}; add it there, or unpack the archive again"
        )
    train = [(file, number[wnid]) for wnid in folders for file in _images(root / "train" / wnid)]
    val = [(root / "val" / "images" / Path(row[0]).name, number[row[1]]) for row in rows]
    if missing := [file for file, _ in val if not file.is_file()]:
        raise UserError(
            f"{root / 'val' / _ANNOTATIONS} lists {len(val)} images, and {len(missing)} of them are missing, such as "
            f"{missing[0]}; unpack the archive again"
        )
    test = _images(root / "test") if (root / "test").is_dir() else []
    skipped = (f"{root / 'test'}: {len(test)} images without labels",) if test else ()
    return RawSplits(_part(train), classes=_names(root, wnids), val=_part(val), skipped=skipped, ordered=bool(listed))


def _lines(file: Path) -> list[str]:
    return [line for line in read_file(file).decode(errors="replace").splitlines() if line.strip()]


def _images(folder: Path) -> list[Path]:
    """Return the image files of a folder and of images/ in it."""
    inside = [file for each in (folder, folder / "images") if each.is_dir() for file in sorted(each.iterdir())]
    return [file for file in inside if file.suffix.lower() in _EXTENSIONS and file.is_file() and file.name[0] != "."]


def _part(rows: list[tuple[Path, int]]) -> RawSplit:
    return read_files([file for file, _ in rows], torch.tensor([label for _, label in rows], dtype=torch.int64))


def _names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the words for the classes, or their numbers if words are missing or not distinct."""
    if not (root / "words.txt").is_file():
        return tuple(wnids)
    titles = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    names = tuple(titles.get(wnid, wnid).strip() for wnid in wnids)
    return names if len(set(names)) == len(names) else tuple(wnids)


READERS.register("tiny_imagenet")(
    Reader(
        "tiny-imagenet-200/train/WNID/images/*.JPEG and val/val_annotations.txt",
        lambda path: _root(path) is not None,
        read_tiny_imagenet,
        rank=45,
        includes=("folder",),
    )
)
