"""CIFAR-10 and CIFAR-100 by name (Krizhevsky 2009); downloads the binary version, which holds no pickles."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from clead.data.base import InMemoryDataset, RawSplits
from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_named
from clead.data.datasets.cifar_files import VERSIONS, assemble
from clead.errors import UserError
from clead.settings import setting, settings


class Archive(NamedTuple):
    """A published archive of the binary version."""

    url: str
    md5: str


ARCHIVES = {
    "cifar10": Archive("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": Archive("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}


@DATASETS.register("cifar10")
@settings
class Cifar10(InMemoryDataset):
    """CIFAR-10, 32×32 RGB, 10 classes, from a path, $CLEAD_DATA/cifar10 or a download of 162 MB."""

    path: Path | None = setting(
        None, "Where it is, in any layout that auto knows; by default $CLEAD_DATA/cifar10, else downloaded."
    )

    def read(self) -> RawSplits:
        """Return the images; raises UserError if they are nowhere and cannot be downloaded."""
        return _read("cifar10", self.path)


@DATASETS.register("cifar100")
@settings
class Cifar100(InMemoryDataset):
    """CIFAR-100, 32×32 RGB, 100 fine classes, from a path, $CLEAD_DATA/cifar100 or a download of 161 MB."""

    path: Path | None = setting(
        None, "Where it is, in any layout that auto knows; by default $CLEAD_DATA/cifar100, else downloaded."
    )

    def read(self) -> RawSplits:
        """Return the images; raises UserError if they are nowhere and cannot be downloaded."""
        return _read("cifar100", self.path)


def _read(name: str, path: Path | None) -> RawSplits:
    version = VERSIONS[f"{name}_binary"]
    raw = read_named(name, path, version.classes)
    if raw is not None:
        return raw
    file = fetch(name, ARCHIVES[name])
    with tarfile.open(file) as tar:  # nothing is unpacked to disk
        members = {each.name: member.read() for each in tar if (member := tar.extractfile(each)) is not None}
    files = [Path(name).name for name in members]
    return assemble(version, files, Path(version.folder), lambda path: members[path.as_posix()])


def fetch(name: str, archive: Archive) -> Path:
    """Return the archive's file in ``$CLEAD_DATA`` or ``~/.cache/clead``, downloaded if need be and verified.

    Raises:
        UserError: there is no network, the file cannot be written, or the checksum is another.
    """
    folder = Path(os.environ.get("CLEAD_DATA") or "~/.cache/clead").expanduser()
    file = folder / archive.url.rsplit("/", 1)[1]
    if file.is_file():
        if (md5 := _md5(file)) != archive.md5:
            raise UserError(f"{file}: the MD5 checksum must be {archive.md5}, got {md5}; delete the file and run again")
        return file
    remedy = f"give --data.path, set CLEAD_DATA to a folder that holds {name}/, or save {archive.url} as {file}"
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        _download(archive.url, Path(partial), name)
        if (md5 := _md5(Path(partial))) != archive.md5:
            raise UserError(f"{archive.url}: the MD5 checksum must be {archive.md5}, got {md5}; try again, or {remedy}")
        os.replace(partial, file)
        return file
    except OSError as error:  # also URLError and timeouts
        reason = getattr(error, "reason", None) or error.strerror or error
        raise UserError(f"{name} could not be downloaded from {archive.url} ({reason}); {remedy}") from None
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def _download(url: str, target: Path, name: str) -> None:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with urllib.request.urlopen(url, timeout=30) as source, target.open("wb") as sink:
        total = int(source.headers.get("Content-Length") or 0) or None
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"downloading {name}", total=total)
            while block := source.read(1 << 20):
                sink.write(block)
                progress.update(task, advance=len(block))


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
