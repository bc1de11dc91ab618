"""Arrays in one NumPy ``.npz`` file, or in a folder of ``.npy`` files."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clead.data.base import InMemoryDataset, RawSplit, RawSplits, resolve_path, split_role
from clead.data.bounded import check_unpacked, read_npy
from clead.data.classes import number_labels
from clead.data.datasets import DATASETS, READERS, Reader
from clead.errors import UserError, first_line
from clead.settings import setting, settings

_ROLES = {
    **dict.fromkeys(("x", "image", "images", "img", "imgs", "data"), "images"),
    **dict.fromkeys(("y", "label", "labels", "target", "targets"), "labels"),
}
_CLASSES = ("classes", "class_names", "classnames", "label_names")
_KNOWN = "x_train, y_train, x_test, y_test (or train_images, train_labels, …; x and y, or images and labels, to evaluate only)"


@DATASETS.register("npz")
@settings
class Npz(InMemoryDataset):
    """A ``.npz`` file with x_train, y_train, x_test, y_test, or train_images, train_labels, …; val and classes (names) optional.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, uint8 or float in [0, 1]; labels are integers or texts.
    x_test, y_test or images, labels alone are to be evaluated on only. A folder of such ``.npy`` files is read, too.
    """

    path: Path = setting(..., "The .npz file, or the folder of .npy files.")

    def read(self) -> RawSplits:
        """Return the arrays; raises UserError if they are not as described."""
        path = resolve_path(self.path)
        return read_npy_folder(path) if path.is_dir() else read_npz(path)


def key_of(name: str) -> tuple[str, str] | None:
    """Return which split and whether images or labels a name stands for; split "" if it says none; None for another name.

    >>> key_of("x_train"), key_of("Test-Labels"), key_of("devY"), key_of("images"), key_of("embedding")
    (('train', 'images'), ('test', 'labels'), ('val', 'labels'), ('', 'images'), None)
    """
    tokens = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W_a-zA-Z]+", name)]
    splits = [role for word in tokens if word not in _ROLES and (role := split_role(word))]
    roles = [_ROLES[word] for word in tokens if word in _ROLES]
    if len(roles) != 1 or len(splits) > 1 or len(tokens) != len(splits) + 1:
        return None
    return (splits[0] if splits else "", roles[0])


def read_npz(path: Path) -> RawSplits:
    """Read the file; pickled content is refused."""
    arrays, skipped = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked(
                path, sum(member.file_size for member in archive.infolist())
            )  # no more is ever read of a member
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if key_of(key) is None and key.lower() not in _CLASSES:
                    skipped.append(key)
                    continue
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{key} is packed in a way that NumPy does not write")
                with archive.open(member) as opened:
                    arrays[key] = read_npy(opened, member.file_size, f"{path}: {key}")
    except UserError:
        raise
    except Exception as error:  # zipfile and its decoders raise whatever a broken file makes them raise
        raise UserError(
            f"{path}: not a readable .npz file ({first_line(error)}); write it with numpy.savez and plain arrays"
        ) from None
    return from_arrays(arrays, path, skipped)


def read_npy_folder(path: Path) -> RawSplits:
    """Read the ``.npy`` files of a folder whose names say what they are, as the keys of a ``.npz`` file."""
    arrays, skipped = {}, []
    for file in sorted(path.iterdir()):
        if file.suffix == ".npy" and (key_of(file.stem) is not None or file.stem.lower() in _CLASSES):
            try:
                with file.open("rb") as opened:
                    arrays[file.stem] = read_npy(opened, file.stat().st_size, str(file))
            except OSError as error:
                raise UserError(
                    f"{file}: cannot be read ({error.strerror}); mend its permissions or remove it"
                ) from None
        elif not file.name.startswith("."):
            skipped.append(file.name)
    return from_arrays(arrays, path, skipped)


def from_arrays(arrays: dict[str, np.ndarray], path: Path, skipped: Iterable[str]) -> RawSplits:
    """Return the splits that named arrays make; raises UserError if one is missing, double or not as it must be."""
    keys: dict[tuple[str, str], str] = {}
    classes_key = None
    for name in arrays:
        key = key_of(name)
        if key is None:
            classes_key = name
        elif key in keys:
            raise UserError(
                f"{path}: {keys[key]} and {name} are both {' '.join(filter(None, key))}; remove or rename one"
            )
        else:
            keys[key] = name
    if any(split for split, _ in keys):
        lone = [keys.pop(key) for key in list(keys) if not key[0]]
        skipped = (*skipped, *lone)
    else:
        keys = {("test", role): name for (_, role), name in keys.items()}
    splits = [split for split in ("train", "val", "test") if any(split == each for each, _ in keys)]
    for split in splits:
        for role, other in (("images", "labels"), ("labels", "images")):
            if (split, role) not in keys:
                expected = keys[split, other].lower().replace("images", "labels").replace("x", "y")
                wanted = expected if role == "labels" else f"the images of {keys[split, other]}"
                raise UserError(
                    f"{path}: must hold {_KNOWN}, lacks {wanted}; it holds {', '.join([*arrays, *skipped])}"
                )
    if not splits:
        raise UserError(
            f"{path}: must hold {_KNOWN}, it holds {', '.join([*arrays, *skipped]) or 'nothing'}; rename its keys"
        )
    images = {split: to_images(arrays[keys[split, "images"]], f"{path}: {keys[split, 'images']}") for split in splits}
    labels = [
        _labels(arrays[keys[split, "labels"]], len(images[split]), f"{path}: {keys[split, 'labels']}")
        for split in splits
    ]
    names = None if classes_key is None else class_names(arrays[classes_key], f"{path}: {classes_key}")
    numbered, classes, notes, ordered = numbered_labels(labels, names, str(path))
    parts: dict[str, Any] = {split: RawSplit(images[split], each) for split, each in zip(splits, numbered, strict=True)}
    return RawSplits(
        **parts,
        classes=classes,
        skipped=tuple(f"{path}: {key}: neither images nor labels by its name" for key in skipped),
        notes=(
            *notes,
            *(note for split in splits for note in _dark(images[split], f"{path}: {keys[split, 'images']}")),
        ),
        ordered=ordered,
    )


def numbered_labels(
    labels: list[np.ndarray], names: list[str] | None, source: str
) -> tuple[list[Tensor], tuple[str, ...], tuple[str, ...], bool]:
    """Return labels as class numbers, the class names, notes, and whether the order of classes is given and not guessed."""
    texts = any(each.dtype.kind == "U" for each in labels)
    if names is None:
        return *number_labels(*labels), not texts
    if texts:
        number = {name: k for k, name in enumerate(names)}
        if unknown := sorted({str(each) for labels_of_split in labels for each in labels_of_split} - set(names)):
            raise UserError(
                f"{source}: the label {unknown[0]!r} is none of the classes {', '.join(names)[:200]}; add it there"
            )
        return (
            [torch.tensor([number[str(each)] for each in labels_of_split]) for labels_of_split in labels],
            tuple(names),
            (),
            True,
        )
    numbers = [each.astype(np.int64) for each in labels]
    values = np.concatenate(numbers)
    if len(values) and values.min() == 1 and values.max() == len(names):
        note = f"labels begin at 1, so label 1 is the first class, {names[0]!r}"
        return [torch.from_numpy(each - 1) for each in numbers], tuple(names), (note,), True
    return [torch.from_numpy(each) for each in numbers], tuple(names), (), True


def class_names(array: np.ndarray, name: str) -> list[str]:
    """Return names from an array of texts, bytes or integers."""
    if array.dtype.kind not in "USiu":
        raise UserError(f"{name} must be texts, got {array.dtype}; write numpy.array(names, dtype=str)")
    return [
        each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each) for each in array.ravel().tolist()
    ]


def _labels(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    """Return (N,) integers or texts."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim == 2 and len(labels) == count and labels.dtype.kind in "biuf":
        if np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
            raise UserError(
                f"{name} must be {count} integers, one per image, not one-hot rows, got {labels.dtype} {labels.shape}; "
                "convert with .argmax(1)"
            )
        raise UserError(
            f"{name}: {labels.shape[1]} labels for each image make it a multi-label set, and a classifier here tells one class for "
            f"each; choose one column: labels[:, 0]"
        )
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.shape != (count,) or labels.dtype.kind not in "biuU":
        remedy = (
            "convert with .astype(int)" if labels.dtype.kind == "f" and labels.shape == (count,) else "mend the file"
        )
        raise UserError(
            f"{name} must be {count} integers or texts, one per image, got {labels.dtype} {labels.shape}; {remedy}"
        )
    return labels


def to_images(array: np.ndarray, name: str) -> Tensor:
    """Return (N, C, H, W) uint8; raises UserError if the shape or the range leave a doubt."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and (array.shape[1] in (1, 3)) != (array.shape[3] in (1, 3)):
        array = array.transpose(0, 3, 1, 2) if array.shape[3] in (1, 3) else array
    else:
        raise UserError(
            f"{name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3 and no doubt which axis it is, got "
            f"{array.shape}; {_shape_remedy(array.shape)}"
        )
    if array.dtype.kind == "f" and array.size:
        low, high = array.min(), array.max()  # NaN if any value is
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{name} of floats must be in [0, 1], got values from {low:g} to {high:g}; {_range_remedy(float(low), float(high))}"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        remedies = {"b": ".astype(numpy.uint8) * 255", "u": ".astype(numpy.uint8)", "i": ".astype(numpy.uint8)"}
        if array.size and array.dtype.kind in "iu" and array.max() > 255:
            remedies |= dict.fromkeys(
                "iu", f"(x / {int(array.max())} * 255).round().astype(numpy.uint8), if {int(array.max())} is white"
            )
        remedy = remedies.get(array.dtype.kind, "numpy.stack(images).astype(numpy.uint8)")
        raise UserError(f"{name} must be uint8 or float in [0, 1], got {array.dtype}; convert with {remedy}")
    return torch.from_numpy(np.array(array, order="C"))


def _shape_remedy(shape: tuple[int, ...]) -> str:
    """Say how to come from another shape of images to a right one."""
    if len(shape) == 5 or (len(shape) == 4 and min(shape[1:]) > 4):
        return "these are volumes; choose a slice of each, such as x[:, x.shape[1] // 2]"
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        return f"drop the alpha channel: {'x[..., :3]' if shape[3] == 4 else 'x[:, :3]'}"
    sides = {side * side * channels: (channels, side) for channels in (3, 1) for side in (8, 28, 32, 64, 96, 224)}
    if len(shape) == 2 and shape[1] in sides:
        channels, side = sides[shape[1]]
        return f"give the rows their shape: x.reshape(-1, {channels}, {side}, {side})"
    if len(shape) == 4 and shape[2] in (1, 3):
        return "if the images lie along the last axis, as in SVHN's .mat files, transpose it: x.transpose(3, 0, 1, 2)"
    if len(shape) == 4:
        return "transpose it: x.transpose(0, 2, 3, 1), or make the sides of the images other than 1 and 3"
    return "reshape it"


def _range_remedy(low: float, high: float) -> str:
    """Say how to bring floats to [0, 1]."""
    if low >= 0 and high <= 255:
        return "divide by the white value: x / 255, or save x.round().astype(numpy.uint8)"
    if low >= -1 and high <= 1:
        return "if -1 is black, shift them: (x + 1) / 2"
    if low != low or high != high:
        return "mend NaN: numpy.nan_to_num(x)"
    return "undo the normalisation: x * std + mean, with the mean and std it was made with"


def _dark(images: Tensor, name: str) -> list[str]:
    """Return a note if uint8 values look like ones of [0, 1]."""
    if images.numel() and 0 < int(images.max()) <= 1:
        return [f"{name}: the largest value is 1 of 255, so the images are nearly black; if 1 is white, save x * 255"]
    return []


def _has_arrays(path: Path) -> bool:
    """Say whether a folder has images and labels of one split as ``.npy`` files, by their names."""
    keys = {key_of(file.stem) for file in path.glob("*.npy")} - {None} if path.is_dir() else set()
    return any((split, "labels") in keys and (split, "images") in keys for split in ("", "train", "val", "test"))


READERS.register("npz")(
    Reader(
        "FILE.npz with x_train, y_train, x_test, y_test",
        lambda path: path.suffix == ".npz" and path.is_file(),
        read_npz,
    )
)
READERS.register("npy")(
    Reader("x_train.npy, y_train.npy, x_test.npy, y_test.npy", _has_arrays, read_npy_folder, rank=60)
)
