"""Archives of data, unpacked into a private temporary folder: no links, no devices, no names that lead out, no bombs."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import logging
import lzma
import os
import re
import shutil
import signal
import stat
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from clead.data.bounded import check_unpacked
from clead.errors import UserError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = logging.getLogger("clead")

_PREFIX = "clead-unpacked-"
_YOUNG = 60.0  # seconds
_ZIP = (".zip",)
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_OTHERS = (".7z", ".rar", ".tar.zst", ".tzst")
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_BLOCK = 2**20
_BETWEEN = 2**22  # bytes that a tar file may spend on what is no file: headers, long names
_MEMBERS, _BYTES_EACH = 10_000, 32  # members: so many, and one more for each so many bytes of the archive
_CLUTTER = re.compile(r"(.*/)?(__MACOSX/.*|\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini)")


class _Damaged(Exception):
    """The archive ends early or has a header that is none."""


def is_archive(path: Path) -> bool:
    """Say by its name whether a file is an archive, also one of a kind that is not unpacked here."""
    return path.name.lower().endswith((*_ZIP, *_TAR, *_OTHERS)) and path.is_file()


@contextmanager
def unpacked(path: Path) -> Generator[Path, None, None]:
    """Unpack an archive into a temporary folder, which is removed in the end, also after an error, Ctrl-C or SIGTERM.

    What a process that was killed has left there is removed by the next one that unpacks.

    Raises:
        UserError: it is damaged, encrypted or of another kind; has a link, a device or a name that leads out of the folder; or
            unpacks to more than images would, or than the disk has room for.
    """
    if path.name.lower().endswith(_OTHERS):
        raise UserError(
            f"{path}: only {', '.join((*_ZIP, *_TAR))} are unpacked; unpack it yourself and give the folder"
        )
    with _ended_by_signals(), _temporary() as folder:
        _log.warning(
            "unpacking %s into a temporary folder; unpack it once yourself to save the time of each command", path
        )
        try:
            unpack = _unpack_zip if path.name.lower().endswith(_ZIP) else _unpack_tar
            unpack(path, folder)
        except UserError:
            raise
        except (MemoryError, KeyboardInterrupt):
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({reason}); fetch it again, or set TMPDIR to a folder "
                "with room, or unpack it yourself and give the folder"
            ) from None
        except Exception as error:  # decoders raise whatever a broken file makes them raise
            raise UserError(
                f"{path}: a damaged archive ({first_line(error)[:200]}); fetch it again, or unpack it yourself and give the folder"
            ) from None
        yield folder


@contextmanager
def _temporary() -> Generator[Path, None, None]:
    """Make a folder that this process holds a lock on, so that others see whether it still lives; remove those of the dead."""
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        handle = None if fcntl is None else os.open(name, os.O_RDONLY)
        try:
            if fcntl is not None and handle is not None:
                with contextlib.suppress(OSError):  # no locks on this file system: no leftovers are removed there
                    fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            if handle is not None:
                os.close(handle)


def _remove_leftovers() -> None:
    """Remove what killed processes of this user have unpacked: folders that nobody holds a lock on, and that are a minute old."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is in use, has just gone, or there are no locks
            about = folder.lstat()
            if about.st_uid != os.geteuid() or time.time() - about.st_ctime < _YOUNG:
                continue  # one that is being made is not locked yet
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)


@contextmanager
def _ended_by_signals() -> Generator[None, None, None]:
    """Let SIGTERM and a hang-up end the block like an error, where they would end the process and leave what is temporary."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names if threading.current_thread() is threading.main_thread()]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _unpack_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)  # zipfile reads no more of a member
        check_unpacked(path, total)
        _check_count(path, len(members))
        if total > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"{path}: unpacks to {total} bytes, and {tempfile.gettempdir()} has room for {free}; set TMPDIR to a folder "
                "with more"
            )
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(path, member.filename, "is a link or a device")
            if member.flag_bits & 1:
                raise _refused(path, member.filename, "is encrypted")
            if target := _target(path, folder, member.filename):
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                with archive.open(member) as source:
                    _write(path, member.filename, source, target)


def _unpack_tar(path: Path, folder: Path) -> None:
    with path.open("rb") as raw:
        first = raw.read(6)
        raw.seek(0)
        opener = next((opener for magic, opener in _OPENERS.items() if first.startswith(magic)), None)
        with opener(raw) if opener else path.open("rb") as content:
            counted = _Counted(content, _BETWEEN)
            # Streaming, so that nothing is read ahead of what is counted.
            with tarfile.open(fileobj=counted, mode="r|", tarinfo=_Header) as archive:
                total = members = 0
                while True:
                    counted.left = _BETWEEN
                    member = archive.next()
                    archive.members = []  # ty: ignore[missing-attribute]  # else it remembers all
                    if member is None:
                        return
                    members += 1
                    _check_count(path, members)
                    if not (member.isreg() or member.isdir()) or member.sparse is not None:
                        raise _refused(path, member.name, "is a link, a device or a sparse file")
                    total += max(member.size, 0)
                    check_unpacked(path, total)
                    target = _target(path, folder, member.name)
                    counted.left = max(member.size, 0) + _BETWEEN
                    if target is not None and member.isdir():
                        target.mkdir(parents=True, exist_ok=True)
                    elif target is not None:
                        source = archive.extractfile(member)
                        assert source is not None
                        _write(path, member.name, source, target)


class _Header(tarfile.TarInfo):
    """A header that ends the reading where it is none: tarfile itself would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Return the header in ``buf``; raises _Damaged if it is none."""
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):  # ty: ignore[missing-attribute]
            raise
        except tarfile.HeaderError as error:
            raise _Damaged(str(error)) from None


class _Counted(io.RawIOBase):
    """A stream that gives ``left`` more bytes, so that a header cannot ask for more memory than its size is checked for."""

    def __init__(self, content: IO[bytes], left: int) -> None:
        self.content, self.left = content, left

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; raises _Damaged beyond the limit."""
        block = self.content.read(min(size, _BLOCK) if size >= 0 else _BLOCK)
        self.left -= len(block)
        if self.left < 0:
            raise _Damaged("headers that are no headers")
        return block


def _write(path: Path, name: str, source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("xb") as sink:
            shutil.copyfileobj(source, sink, _BLOCK)
    except FileExistsError:
        raise _refused(path, name, "is there twice") from None


def _target(path: Path, folder: Path, name: str) -> Path | None:
    """Return where a member goes, None for clutter; UserError if its name leads out of the folder."""
    plain = name.replace("\\", "/")
    parts = [component for component in plain.split("/") if component not in ("", ".")]
    if plain.startswith("/") or ".." in parts or re.match("[A-Za-z]:", plain) or "\0" in plain:
        raise _refused(path, name, "leads out of the folder")
    if not parts or _CLUTTER.fullmatch(plain):
        return None
    return folder.joinpath(*parts)


def _check_count(path: Path, members: int) -> None:
    if members > (limit := _MEMBERS + path.stat().st_size // _BYTES_EACH):
        raise UserError(
            f"{path}: more than {limit} files in {path.stat().st_size} bytes are no images (a zip bomb?); unpack it yourself and "
            "give the folder"
        )


def _refused(path: Path, name: str, reason: str) -> UserError:
    return UserError(f"{path}: {name[:200]!r} in it {reason}, which is refused; unpack it yourself and give the folder")
