"""Your own images at a path, whatever their layout."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clead.data.archives import is_archive, unpacked
from clead.data.base import InMemoryDataset, RawSplits, resolve_path, split_role
from clead.data.datasets import DATASETS, READERS, Reader
from clead.data.files import describe, files_below, is_image, visible_folders
from clead.errors import UserError
from clead.settings import setting, settings

_CONVERSIONS = {
    ".mat": "d = scipy.io.loadmat(FILE); numpy.savez('images.npz', x_train=d['X'].transpose(3, 0, 1, 2), y_train=d['y'].ravel()), "
    "with the names that d.keys() shows",
    ".arrow": "datasets.load_from_disk(FOLDER)['train'].to_parquet('train.parquet'), and each other split likewise",
    ".h5": "f = h5py.File(FILE); numpy.savez('images.npz', x_train=f['x'][:], y_train=f['y'][:]), "
    "with the names that f.keys() shows",
    ".npy": "numpy.savez('images.npz', x_test=numpy.stack([numpy.load(f) for f in FILES]), y_test=LABELS)",
    **dict.fromkeys((".pt", ".pth"), "numpy.savez('images.npz', x_test=IMAGES.numpy(), y_test=LABELS.numpy())"),
    **dict.fromkeys((".pkl", ".pickle"), "numpy.savez('images.npz', x_test=IMAGES, y_test=LABELS)"),
    **dict.fromkeys(
        (".tga", ".ico", ".pcx", ".dds", ".psd", ".heic", ".heif", ".svg", ".dcm", ".exr"),
        "PIL.Image.open(FILE).convert('RGB').save('NAME.png') for each (.heic: with pillow_heif; .svg: with cairosvg)",
    ),
}
"""Endings of files that are not read -> how to come from there to what is, in Python."""
_ARCHIVES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar"),
    *(".gz", ".bz2", ".xz", ".zst"),
)


@DATASETS.register("auto")
@settings
class Auto(InMemoryDataset):
    """Images at a path: a folder of Parquet files, one with train/CLASS/ and test/CLASS/, or a .npz file."""

    path: Path = setting(..., "The folder or file; its content decides how it is read.")

    def read(self) -> RawSplits:
        """Return what is there; raises UserError if nothing known is."""
        return read_any(self.path)


def read_any(path: Path, dataset: str | None = None) -> RawSplits:
    """Read a path by its content: of the layouts that lie there, the one of ``dataset``, else the one of lowest rank.

    A note names the other layouts that lie there. An archive is unpacked into a temporary folder and read from there.
    """
    path = resolve_path(path)
    if is_archive(path):
        return _read_archive(path, dataset)
    candidates = [(name, reader) for name, reader in READERS.items() if recognizes(reader, path)]
    candidates.sort(key=lambda item: (dataset is not None and item[1].dataset != dataset, item[1].rank))
    if candidates:
        (_, reader), *further = candidates
        if dataset is not None and reader.dataset not in (None, dataset):
            raise UserError(
                f"data.path must hold {dataset}, got {str(path)!r}, which holds {reader.dataset}; give the path of {dataset}, "
                "or use --data.name auto"
            )
        raw = reader.read(path)
        if beside := [other.layout for name, other in further if name not in reader.includes]:
            note = f"read as {reader.layout}; there also lies {' and '.join(beside)}, which is not read"
            raw = raw._replace(notes=(*raw.notes, note))
        return raw
    raise UserError(_unknown(path))


def _read_archive(path: Path, dataset: str | None) -> RawSplits:
    """Read what an archive holds; a folder that is alone in it is stepped into. Names are told as if it were a folder."""
    with unpacked(path) as folder:
        content = folder
        while content.is_dir() and len(inside := list(content.iterdir())) == 1 and split_role(inside[0].name) is None:
            content = inside[0]
        try:
            if is_archive(content):
                raise UserError(
                    f"{content}: an archive in an archive is not unpacked; unpack it yourself and give the folder"
                )
            raw = read_any(content, dataset)
        except UserError as error:
            raise UserError(*(problem.replace(str(folder), str(path)) for problem in error.problems)) from None
        parts = {
            name: dataclasses.replace(split, names=[each.replace(str(folder), str(path)) for each in split.names])
            for name, split in raw.parts.items()
        }
        skipped = tuple(each.replace(str(folder), str(path)) for each in raw.skipped)
        notes = tuple(each.replace(str(folder), str(path)) for each in raw.notes)
        return raw._replace(**parts, skipped=skipped, notes=notes)


def _unknown(path: Path) -> str:
    """Say what lies at a path that no reader recognizes, which known layout is nearest, and what to do; one line."""
    if path.is_dir():
        content = describe(path)
        near = _nearest([entry.suffix.lower() for entry in path.iterdir() if entry.is_file()])
        folders, images = visible_folders(path), any(is_image(entry) for entry in path.iterdir() if entry.is_file())
        remedy = f"a layout that is read is {near}"
        endings = Counter(file.suffix.lower() for file, _ in itertools.islice(files_below(path), 1000))
        if convertible := [ending for ending, _ in endings.most_common() if ending in _CONVERSIONS]:
            remedy = f"*{convertible[0]} is not read; convert it in Python: {_CONVERSIONS[convertible[0]]}"
            return f"data.path must have a layout that is read, got {str(path)!r}, a folder with {content}; {remedy}"
        if content == "nothing":
            target = path / "train" / "CLASS"
            return f"data.path must hold images, got {str(path)!r}, an empty folder; put the images of each class into {target}"
        if images:
            remedy = "the images lie in no class folder; put those of each class into a folder of its own: "
            remedy += f"{path / 'train' / 'CLASS'}"
        elif folders and near == READERS.get("folder").layout:
            remedy += f"; put a folder of images for each class into {path / 'train'}"
        return f"data.path must have a layout that is read, got {str(path)!r}, a folder with {content}; {remedy}"
    if not path.is_file():
        return (
            f"data.path must be a folder or a file, got {str(path)!r}, which is neither; give the folder of the images"
        )
    if is_image(path):
        return (
            f"data.path must hold images of several classes, got {str(path)!r}, one image; give the folder that holds the class "
            f"folders: --data.path {path.parent.parent}"
        )
    if path.name.lower().endswith(_ARCHIVES):
        return f"data.path must be unpacked, got the archive {str(path)!r}; unpack it and give the folder"
    if conversion := _CONVERSIONS.get(path.suffix.lower()):
        return f"data.path must have a layout that is read, got {str(path)!r}; convert it in Python: {conversion}"
    kind = "a text file" if _is_text(path) else "a file of another kind"
    return (
        f"data.path must have a layout that is read, got {str(path)!r}, {kind}; give the folder of the images, or such a file: "
        f"{_nearest([path.suffix.lower()])}"
    )


def _nearest(suffixes: Sequence[str]) -> str:
    """Return the layout that names most of these endings of files, class folders if none does."""
    layouts = [reader.layout for _, reader in sorted(READERS.items(), key=lambda item: item[0] != "folder")]
    return max(layouts, key=lambda layout: sum(suffix in layout for suffix in suffixes if suffix))


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096)
    return b"\0" not in head and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def recognizes(reader: Reader, path: Path) -> bool:
    """Say whether the path has the reader's layout; a folder that may not be looked into has none."""
    try:
        return reader.recognizes(path)
    except OSError:
        return False


def read_named(name: str, path: Path | None, classes: int) -> RawSplits | None:
    """Read the path, else ``$CLEAD_DATA/name``, checking the number of classes; None if neither is there."""
    data = os.environ.get("CLEAD_DATA")
    if path is None and data and (Path(data).expanduser() / name).exists():
        path = Path(data) / name
    if path is None:
        return None
    raw = read_any(path, name)
    if len(raw.classes) != classes:
        raise UserError(
            f"{name} has {classes} classes, got {len(raw.classes)} at {str(path)!r}; use --data.name auto "
            "for other data"
        )
    return raw
