"""Image files in one folder per class."""

from __future__ import annotations

from pathlib import Path

import torch

from clead.data.base import Found, InMemoryDataset, Part, existing, no_images
from clead.data.datasets import DATASETS, READERS, Reader
from clead.errors import UserError
from clead.settings import setting, settings

EXTENSIONS = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp")


@DATASETS.register("folder")
@settings
class Folder(InMemoryDataset):
    """Image files in train/CLASS/ and test/CLASS/; without test/, a fixed fifth of train/; test/ alone to evaluate only."""

    path: Path = setting(..., "The folder that holds train/ and test/.")

    def read(self) -> Found:
        """Return the files' bytes; raises UserError if the folders are not as described."""
        return read_folder(existing(self.path))


def read_folder(root: Path) -> Found:
    """Read the files of train/CLASS/ and test/CLASS/; classes are train's folder names, sorted."""
    if not (root / "train").is_dir() and (root / "test").is_dir():  # to be evaluated on, not trained
        classes = [folder.name for folder in _folders(root / "test")]
        return Found(no_images(), _part(root, "test", classes), tuple(classes))
    if not (root / "train").is_dir():
        raise UserError(f"{root} must hold a folder train/ with one folder per class; put the images in train/CLASS/")
    classes = [folder.name for folder in _folders(root / "train")]
    if not classes:
        raise UserError(f"{root / 'train'} holds no class folder; put the images in train/CLASS/")
    train = _part(root, "train", classes)
    if (root / "test").is_dir():
        # Classes that only test has get numbers behind, so that the check names them.
        extra = [folder.name for folder in _folders(root / "test") if folder.name not in classes]
        return Found(train, _part(root, "test", classes + extra), (*classes, *extra))
    return Found(train, no_images(), tuple(classes))


def _folders(parent: Path) -> list[Path]:
    return sorted(entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _part(root: Path, part: str, classes: list[str]) -> Part:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / part / name
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        images = [file for file in inside if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")]
        if not images and (part == "train" or folder.is_dir()):
            raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)}); add images or remove the folder")
        files += images
        labels += [label] * len(images)
    try:
        blobs = [file.read_bytes() for file in files]
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); mend its permissions or remove it"
        ) from None
    return Part(blobs, torch.tensor(labels, dtype=torch.int64), list(map(str, files)))


READERS.register("folder")(
    Reader(
        "train/CLASS/*.png and test/CLASS/*.png",
        lambda path: (path / "train").is_dir() or (path / "test").is_dir(),
        read_folder,
        rank=90,
    )
)
