"""Image files in one folder per class, with or without splits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clead.data.base import (
    InMemoryDataset,
    RawSplit,
    RawSplits,
    Role,
    read_files,
    resolve_path,
    split_role,
    split_words,
)
from clead.data.classes import class_order
from clead.data.datasets import DATASETS, READERS, Reader
from clead.data.files import EXTENSIONS, describe, display, files_below, holds_image, is_image, visible_folders
from clead.data.tables import SUFFIXES
from clead.errors import UserError
from clead.settings import setting, settings

_WRAPPERS = ("images", "imgs", "image", "img", "data")  # a folder between a split and its classes
_WORDS = {"train": "training", "val": "validation", "test": "test"}
_DEEPEST = 5  # folders that hold one folder only
_NO_CLASS, _NO_SPLIT = "lies in no class folder", "lies in no split folder"


@DATASETS.register("folder")
@settings
class Folder(InMemoryDataset):
    """Image files in train/CLASS/, val/CLASS/ and test/CLASS/, at any depth; or in CLASS/ alone.

    Splits may be called train or training, val, valid, validation or dev, and test or testing, and lie one folder deeper. Without
    test images the validation images serve, without either a fixed fifth of the training images.
    """

    path: Path = setting(..., "The folder that holds train/ and test/, or a folder for each class.")

    def read(self) -> RawSplits:
        """Return the files' bytes; raises UserError if the folders are not as described."""
        return read_folder(resolve_path(self.path))


def read_folder(root: Path) -> RawSplits:
    """Read the files of SPLIT/CLASS/ or of CLASS/; classes are the folders' names of all splits, as ``class_order`` says.

    Raises:
        UserError: there is no image in a class folder; a training class has none; it is not clear which folder is a split, or the
            folder is itself the training split of a data set.
    """
    base = _stepped_into(root)
    splits, siblings = _splits(base), {}
    if not splits and base == root and (role := split_role(root.resolve().name)):
        siblings = {
            other: folder for other, folder in _splits(root.resolve().parent, deeper=False).items() if other != role
        }
        if siblings and role == "train":
            raise UserError(
                f"{root} is the training split of a data set, beside {', '.join(folder.name for folder in siblings.values())}; "
                f"give the folder above: --data.path {root.resolve().parent}"
            )
        splits = {role: root} if siblings else {}
    if not splits:
        return _read_unsplit(root, base)
    folders = {role: _class_folders(folder) for role, folder in splits.items()}
    names = class_order(
        folder.name for some in [*folders.values(), *map(_class_folders, siblings.values())] for folder in some
    )
    if set(splits) == {"train"}:
        _refuse_unnamed_split(splits["train"], names)
    for role, some in folders.items():
        _refuse_masks(splits[role], some)
    owners = {folder: (role, folder.name) for role, some in folders.items() for folder in some}
    parts, skipped = _read_files(root, owners, names, splits)
    notes = [
        note
        for role, folder in splits.items()
        for note in _check_split(role, folder, folders[role], parts[role], names)
    ]
    if not any(len(split.labels) for split in parts.values()):
        first = next(iter(splits.values()))
        raise UserError(
            f"{first} holds no class folder with images; put the images of each class into {first / 'CLASS'}"
        )
    val = parts["val"] if len(parts["val"].labels) else None
    return RawSplits(parts["train"], parts["test"], tuple(names), val, skipped, tuple(notes))


def _stepped_into(root: Path) -> Path:
    """Return the folder that holds splits or several class folders: ``root``, or the one folder with images in it, and so on."""
    for _ in range(_DEEPEST):
        folders = [folder for folder in visible_folders(root) if holds_image(folder)]
        if len(folders) != 1 or split_role(folders[0].name) or any(map(is_image, _files(root))):
            break
        inside = [folder for folder in visible_folders(folders[0]) if holds_image(folder)]
        if not inside or any(map(is_image, _files(folders[0]))):
            break
        root = folders[0]
    return root


def _files(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_file()]


def _read_unsplit(root: Path, base: Path) -> RawSplits:
    """Read CLASS/ in ``base``, which is ``root`` or below it: each folder with an image is a class."""
    folders = [folder for folder in visible_folders(base) if holds_image(folder)]
    if not folders:
        raise UserError(
            f"{root} must hold folders with images, train/CLASS/ and test/CLASS/ or CLASS/, got {describe(root)}; put the images "
            f"of each class into {root / 'train' / 'CLASS'}"
        )
    if all(split_role(folder.name) for folder in folders):
        raise UserError(
            f"{root}: the images in {' and '.join(folder.name for folder in folders)} lie in no class folder, so that their "
            f"classes are unknown; put those of each class into {folders[0] / 'CLASS'}"
        )
    _refuse_masks(base, folders)
    _refuse_one_class(base, folders)
    _refuse_split_lists(root, base)
    notes = _refuse_inner_splits(base, folders)
    names = class_order(folder.name for folder in folders)
    parts, skipped = _read_files(root, {folder: ("train", folder.name) for folder in folders}, names, {})
    return RawSplits(parts["train"], classes=tuple(names), skipped=skipped, notes=notes, unsplit=True)


def _refuse_masks(base: Path, folders: Sequence[Path]) -> None:
    """Raise UserError if the folders hold images and their masks: they are no classes."""
    names = {folder.name.lower() for folder in folders}
    if len(names) == 2 and names & {"images", "image", "imgs", "img"} and names & {"masks", "mask", "annotations"}:
        raise UserError(
            f"{base}: {_some(folders)} look like images and their masks, not like classes; give --data.name masks and --task "
            "segmentation, or rename the folders"
        )


def _refuse_one_class(base: Path, folders: Sequence[Path]) -> None:
    """Raise UserError if all images lie in one folder, which is then hardly a class."""
    if len(folders) > 1:
        return
    tables = [entry.name for entry in _files(base) if entry.suffix.lower() in (*SUFFIXES, ".txt", ".mat")]
    table = ", path,label[,split], instead of " + " and ".join(map(display, tables[:3])) if tables else ", path,label"
    raise UserError(
        f"{base}: all images lie in one folder, {display(folders[0].name)}, so that their classes are unknown; put those of each "
        f"class into {base / 'CLASS'}, or write a table {base / 'labels.csv'} with the columns{table.removeprefix(',')} (images of "
        f"one class alone: {base / 'test' / 'CLASS'})"
    )


def _refuse_inner_splits(base: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    """Return a note if all class folders hold folders of the same names, which may be the classes; UserError if they are splits."""
    inside = [{folder.name for folder in visible_folders(each) if holds_image(folder)} for each in folders]
    common = sorted(set.intersection(*inside))
    if roles := [name for name in common if split_role(name)]:
        raise UserError(
            f"{base}: {_some(folders)} each hold {' and '.join(map(display, roles))}, so that classes lie above splits; move them: "
            f"{folders[0] / roles[0]} to {base / roles[0] / folders[0].name}, and so on"
        )
    if len(common) < 2:
        return ()
    names = ", ".join(map(display, common[:5])) + (", …" if len(common) > 5 else "")
    return (
        f"the classes are the folders {_some(folders)}, which all hold folders of the same names ({names}); if those are the "
        f"classes, give one of the folders: --data.path {folders[0]}",
    )


def _refuse_split_lists(root: Path, base: Path) -> None:
    """Raise UserError if a list is there that is called as splits are: in a folder from ``root`` to ``base``, or one in it."""
    between = [base, *(folder for folder in base.parents if folder.is_relative_to(root))]
    places = [*between, *(each for folder in between for each in visible_folders(folder) if not holds_image(each))]
    files = [entry for place in places for entry in _files(place) if entry.suffix.lower() in (".txt", ".lst", ".list")]
    if lists := sorted(entry for entry in files if _is_split_list(entry.stem)):
        raise UserError(
            f"{lists[0]} has the name of a list of training or test images, which is not read; write a table {base / 'labels.csv'} "
            "with the columns path,label,split, or remove the list to take all images"
        )


def _is_split_list(stem: str) -> bool:
    tokens = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", stem).lower())
    extra = ("list", "lists", "split", "files", "file", "set", "images", "image")
    return any(map(split_role, tokens)) and all(split_role(word) or word in extra for word in tokens)


def _refuse_unnamed_split(train: Path, names: Sequence[str]) -> None:
    """Raise UserError if a folder beside the training split holds folders of its classes, and so must be a split held out."""
    for entry in visible_folders(train.parent):
        if entry != train and (same := sorted({each.name for each in _class_folders(entry)} & set(names))):
            raise UserError(
                f"{entry}: this name says no split, but the folder holds classes of {train.name} ({', '.join(same[:3])}); "
                f"rename it to {entry.with_name('test')} or {entry.with_name('val')} if its images are held out, else move it"
            )


def _some(folders: Sequence[Path]) -> str:
    names = [display(folder.name) for folder in folders]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _splits(folder: Path, *, deeper: bool = True) -> dict[Role, Path]:
    """Return the folder of each split in ``folder``, else in the one folder in it that has some."""
    named = _named_splits(folder)
    splits: dict[Role, Path] = {}
    if any(visible_folders(entry) for entry in named) or (named and not any(map(holds_image, visible_folders(folder)))):
        for entry, role in named.items():
            if role in splits:
                raise UserError(
                    f"{folder}: {splits[role].name} and {entry.name} both hold {_WORDS[role]} images; rename or remove one"
                )
            splits[role] = entry
    if splits or not deeper:
        return splits
    inside = [
        (entry, inner_splits) for entry in visible_folders(folder) if (inner_splits := _splits(entry, deeper=False))
    ]
    inside = [
        (entry, inner_splits) for entry, inner_splits in inside if any(map(visible_folders, inner_splits.values()))
    ]
    if len(inside) > 1:
        raise UserError(
            f"{folder}: {' and '.join(entry.name for entry, _ in inside)} have splits of their own; give one: --data.path "
            f"{inside[0][0]}"
        )
    return inside[0][1] if inside else {}


def _named_splits(folder: Path) -> dict[Path, Role]:
    """Return the folders whose names say a split: test, train_set; or pairs such as seg_train and seg_test."""
    folders = visible_folders(folder)
    if named := {entry: role for entry in folders if (role := split_role(entry.name))}:
        return named
    groups: dict[str, dict[Path, Role]] = {}
    for entry in folders:
        role, rest = split_words(entry.name)
        if role and visible_folders(entry):
            groups.setdefault(rest, {})[entry] = role
    return next((group for group in groups.values() if len(set(group.values())) > 1), {})


def _class_folders(split: Path) -> list[Path]:
    """Return the class folders of a split, which may lie in a folder images/ in it, or in one that is called as the split."""
    folders = visible_folders(split)
    if len(folders) == 1 and folders[0].name.lower() in (*_WRAPPERS, split.name.lower()):
        return visible_folders(folders[0])
    return folders


def _read_files(
    root: Path, owners: Mapping[Path, tuple[Role, str]], names: list[str], splits: Mapping[Role, Path]
) -> tuple[dict[Role, RawSplit], tuple[str, ...]]:
    """Read the images in class folders, by class and then by path, and say of every other file below ``root`` why it is not read.

    Args:
        root: the folder of everything.
        owners: class folder -> its split and class.
        names: the classes in order.
        splits: the folders of the splits, which are looked through first: what they link to elsewhere is theirs.
    """
    images: dict[tuple[Role, str], list[Path]] = {}
    skipped: list[str] = []
    seen: set[Path] = set()
    for start in (*splits.values(), root):
        for file, reason in files_below(start, seen):
            owner = next((owners[folder] for folder in file.parents if folder in owners), None)
            if reason is None and owner is not None:
                images.setdefault(owner, []).append(file)
            else:
                inside = start != root or not splits
                skipped.append(f"{display(file)}: {reason or (_NO_CLASS if inside else _NO_SPLIT)}")
    parts: dict[Role, RawSplit] = {}
    for role in ("train", "val", "test"):
        files = [(file, k) for k, name in enumerate(names) for file in sorted(images.get((role, name), ()))]
        parts[role] = read_files([file for file, _ in files], torch.tensor([k for _, k in files], dtype=torch.int64))
    return parts, tuple(sorted(skipped, key=lambda line: line.endswith("operating system")))


def _check_split(role: Role, split: Path, folders: list[Path], images: RawSplit, names: list[str]) -> list[str]:
    """Return what must be known of a split, a sentence each; raises UserError for a training class without an image."""
    counts = torch.bincount(images.labels, minlength=len(names)).tolist()
    empty = [folder for folder in folders if not counts[names.index(folder.name)]]
    if role == "train" and not folders:
        raise UserError(f"{split} holds no class folder; put the images in {split / 'CLASS'}")
    if role == "train" and empty:
        raise UserError(
            f"{empty[0]} holds no image that can be read ({', '.join(EXTENSIONS)}); add images or remove the folder"
        )
    if not len(images.labels):
        return [f"no image in {split.name}/ lies in a class folder, so none of it is read"]
    if empty:
        some = ", ".join(display(folder.name) for folder in empty[:5]) + (", …" if len(empty) > 5 else "")
        return [f"{len(empty)} class folders hold no {_WORDS[role]} image: {some}"]
    return []


def has_class_folders(path: Path) -> bool:
    """Say whether a folder has this layout, or looks as if it should."""
    if not path.is_dir():
        return False
    folders = visible_folders(path)
    for folder in folders:
        if split_role(folder.name) and (visible_folders(folder) or not any(folder.iterdir())):
            return True
    return any(map(holds_image, folders))


READERS.register("folder")(
    Reader(
        "train/CLASS/*.png, val/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png",
        has_class_folders,
        read_folder,
        rank=90,
    )
)
