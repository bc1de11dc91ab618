"""CIFAR-10 and CIFAR-100 as their binary and Python versions are unpacked, and as torchvision keeps them; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clead.data.array_pickle import read_values
from clead.data.base import NO_IMAGES, RawSplit, RawSplits
from clead.data.bounded import read_file
from clead.data.datasets import READERS, Reader
from clead.errors import UserError

_PIXELS = 3 * 32 * 32
_AGAIN = "unpack the archive again"


class Version(NamedTuple):
    """A published version of a data set: the folder as which it is unpacked, and the files in it.

    A record of the binary version is ``label_bytes`` labels, of which the last counts, and 3·32·32 pixels. A file of the Python
    version is a pickle of a dict with ``data``, ``labels_key`` and ``names_key``.
    """

    dataset: str
    classes: int
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int = 0
    labels_key: str = ""
    names_key: str = ""

    def folder_in(self, path: Path) -> Path | None:
        """Return the folder called so in ``path``, or ``path`` itself, if it holds one of the files."""
        files = (self.test, *self.train)
        places = [(each, each / file) for each in (path / self.folder, path) for file in files]
        folder, file = next(((each, file) for each, file in places if file.is_file()), (None, path))
        if folder is None or folder.name == self.folder or self.label_bytes:
            return folder
        # Files of the Python version have such common names that the first byte must be a pickle's, too.
        with file.open("rb") as opened:
            return folder if opened.read(1) in (b"\x80", b"(", b"}") else None

    def images_in(self, content: bytes, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return images, (N, 3, 32, 32) uint8, and labels, (N,) int64; raises UserError for another content."""
        if not self.label_bytes:
            images, labels = self._pickled_images(content, file)
            return images.reshape(-1, 3, 32, 32), labels
        size = self.label_bytes + _PIXELS
        if len(content) % size or not content:
            raise UserError(
                f"{file} must be records of {size} bytes ({self.label_bytes} label, {_PIXELS} pixels), got {len(content)} bytes; "
                f"{_AGAIN}"
            )
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
        images = records[:, self.label_bytes :].reshape(-1, 3, 32, 32)
        return images, records[:, self.label_bytes - 1].astype(np.int64)

    def names_in(self, content: bytes, file: Path) -> list[str]:
        """Return the names of the classes; raises UserError for another content."""
        if self.label_bytes:
            return content.decode(errors="replace").split()
        names = self._values(content, file).get(self.names_key, [])
        texts = [each.decode("latin-1") if isinstance(each, bytes) else each for each in names]
        if not isinstance(names, list) or not all(isinstance(each, str) for each in texts):
            raise UserError(f"{file}: {self.names_key!r} must be a list of texts; {_AGAIN}")
        return texts

    def _pickled_images(self, content: bytes, file: Path) -> tuple[np.ndarray, np.ndarray]:
        values = self._values(content, file)
        data, labels = values.get("data"), values.get(self.labels_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
            raise UserError(f"{file}: 'data' must be an array (N, 3072) of uint8, got {_kind(data)}; {_AGAIN}")
        whole = isinstance(labels, (list, np.ndarray)) and len(labels) == len(data)
        numbers = [each.item() if isinstance(each, np.generic) else each for each in labels] if whole else []
        if not whole or not all(isinstance(each, int) and 0 <= each < self.classes for each in numbers):
            raise UserError(
                f"{file}: {self.labels_key!r} must be {len(data)} integers from 0 to {self.classes - 1}, one per image, got "
                f"{_kind(labels)}; {_AGAIN}"
            )
        return data, np.array(numbers, dtype=np.int64)

    def _values(self, content: bytes, file: Path) -> dict[str, Any]:
        remedy = (
            "take the binary version (cs.toronto.edu/~kriz/cifar.html), or, if you trust the file, convert it in Python: "
            f"d = pickle.load(open({file.name!r}, 'rb'), encoding='latin1'); numpy.savez('{file.name}.npz', "
            f"x_test=d['data'].reshape(-1, 3, 32, 32), y_test=d[{self.labels_key!r}])"
        )
        return read_values(content, str(file), remedy)


_BATCHES = [f"data_batch_{n}" for n in range(1, 6)]
_BINARY = tuple(f"{name}.bin" for name in _BATCHES)
_KEYS = ("fine_labels", "fine_label_names")
VERSIONS = {
    "cifar10_binary": Version("cifar10", 10, "cifar-10-batches-bin", _BINARY, "test_batch.bin", "batches.meta.txt", 1),
    "cifar10_python": Version(
        *(
            "cifar10",
            10,
            "cifar-10-batches-py",
            tuple(_BATCHES),
            "test_batch",
            "batches.meta",
            0,
            "labels",
            "label_names",
        )
    ),
    "cifar100_binary": Version(
        "cifar100", 100, "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2
    ),
    "cifar100_python": Version("cifar100", 100, "cifar-100-python", ("train",), "test", "meta", 0, *_KEYS),
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


def read_cifar(path: Path, version: Version) -> RawSplits:
    """Read the folder or the one called as unpacked in it; raises UserError if a file is missing or has another content."""
    folder = version.folder_in(path)
    if folder is None:
        raise UserError(f"{path} must hold {version.folder}/{version.test}; unpack the archive there")
    missing = [file for file in version.train if not (folder / file).is_file()]
    if missing and len(missing) < len(version.train):
        raise UserError(
            f"{folder} must hold {', '.join(version.train)}, lacks {', '.join(missing)}; {_AGAIN}, or remove the others to "
            "evaluate on the test images only"
        )
    files = [*([] if missing else version.train), version.test, version.names]
    return assemble(version, [file for file in files if (folder / file).is_file()], folder, read_file)


def assemble(version: Version, files: Sequence[str], folder: Path, read: Callable[[Path], bytes]) -> RawSplits:
    """Return what the files of a folder hold, which ``read`` reads."""

    def read_split(names: Sequence[str]) -> RawSplit:
        content = [version.images_in(read(folder / name), folder / name) for name in names if name in files]
        if not content:
            return NO_IMAGES
        images, labels = (np.concatenate(each) for each in zip(*content, strict=True))
        return RawSplit(torch.from_numpy(images), torch.from_numpy(labels))

    train, test, file = read_split(version.train), read_split([version.test]), folder / version.names
    names = version.names_in(read(file), file) if version.names in files else []
    if names and len(names) != version.classes:
        raise UserError(f"{file} must name {version.classes} classes, got {len(names)}; {_AGAIN}")
    return RawSplits(train, test, tuple(names) or CLASSES[version.dataset], ordered=True)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{len(value)} others" if isinstance(value, list) else type(value).__name__


def _register(name: str, version: Version, rank: int) -> None:
    READERS.register(name)(
        Reader(
            f"{version.folder}/{version.test}",
            lambda path: version.folder_in(path) is not None,
            lambda path: read_cifar(path, version),
            rank=rank,
            dataset=version.dataset,
        )
    )


for _rank, (_name, _version) in enumerate(VERSIONS.items(), 20):
    _register(_name, _version, _rank)
