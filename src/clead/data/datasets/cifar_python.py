"""CIFAR-10 and CIFAR-100 as their Python version is unpacked, and as torchvision keeps them; its pickles are not unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clead.data.array_pickle import read_values
from clead.data.base import RawSplit, RawSplits, no_images
from clead.data.bounded import read_file
from clead.data.datasets import READERS, Reader
from clead.data.datasets.cifar_binary import folder_of, named, present
from clead.errors import UserError


class Files(NamedTuple):
    """The files of one CIFAR, each a pickle of a dict, and the keys in it."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    labels_key: str
    names_key: str
    classes: int


FILES = {
    "cifar10": Files(
        "cifar-10-batches-py",
        tuple(f"data_batch_{n}" for n in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
        10,
    ),
    "cifar100": Files("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names", 100),
}


def read_cifar_python(path: Path, name: str) -> RawSplits:
    """Read the folder or the one called as unpacked in it; raises UserError if a file is missing or has another content."""
    files = FILES[name]
    folder = _folder(path, files)
    if folder is None:
        raise UserError(f"{path} must hold {files.folder}/{files.test}; unpack the archive there")
    parts = []
    for file_names in present(folder, files.train, files.test):
        content = [_batch(folder / file, files) for file in file_names]
        if not content:
            parts.append(no_images())
            continue
        images, labels = (np.concatenate(each) for each in zip(*content, strict=True))
        parts.append(RawSplit(torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels)))
    file = folder / files.names
    classes = _values(file).get(files.names_key, []) if file.is_file() else []
    texts = [each.decode("latin-1") if isinstance(each, bytes) else each for each in classes]
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in texts):
        raise UserError(f"{file}: {files.names_key!r} must be a list of texts; unpack the archive again")
    return named(parts[0], parts[1], texts, file, name)


def _batch(file: Path, files: Files) -> tuple[np.ndarray, np.ndarray]:
    """Return images, (N, 3072) uint8, and labels, (N,) int64."""
    values = _values(file)
    data, labels = values.get("data"), values.get(files.labels_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise UserError(
            f"{file}: 'data' must be an array (N, 3072) of uint8, got {_kind(data)}; unpack the archive again"
        )
    whole = isinstance(labels, (list, np.ndarray)) and len(labels) == len(data)
    if not whole or not all(isinstance(each, int) and 0 <= each < files.classes for each in map(_number, labels)):
        raise UserError(
            f"{file}: {files.labels_key!r} must be {len(data)} integers from 0 to {files.classes - 1}, one per image, got "
            f"{_kind(labels)}; unpack the archive again"
        )
    return data, np.array([int(each) for each in labels], dtype=np.int64)


def _number(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{len(value)} others" if isinstance(value, list) else type(value).__name__


def _values(file: Path) -> dict[str, Any]:
    key = "fine_labels" if file.name in FILES["cifar100"][1:3] else "labels"
    remedy = (
        "take the binary version (cs.toronto.edu/~kriz/cifar.html), or, if you trust the file, convert it in Python: "
        f"d = pickle.load(open({file.name!r}, 'rb'), encoding='latin1'); "
        f"numpy.savez('{file.name}.npz', x_test=d['data'].reshape(-1, 3, 32, 32), y_test=d[{key!r}])"
    )
    return read_values(read_file(file), str(file), remedy)


def _folder(path: Path, files: Files) -> Path | None:
    """Return the folder; CIFAR-100's files have such common names that their first byte must be a pickle's, too."""
    folder = folder_of(path, files.folder, (files.test, *files.train))
    if folder is None or folder.name == files.folder:
        return folder
    file = next(folder / name for name in (files.test, *files.train) if (folder / name).is_file())
    with file.open("rb") as opened:
        return folder if opened.read(2)[:1] in (b"\x80", b"(", b"}") else None


def _register(name: str, files: Files) -> None:
    READERS.register(f"{name}_python")(
        Reader(
            f"{files.folder}/{files.test}",
            lambda path: _folder(path, files) is not None,
            lambda path: read_cifar_python(path, name),
            rank=21 if name == "cifar10" else 23,
            dataset=name,
        )
    )


for _name, _files in FILES.items():
    _register(_name, _files)
