"""Access to files: only regular files are read, up to a limit; files are written whole or not at all; links lead nowhere else.

Two kinds of path are told apart. What lies *inside* a run, a state or a study came with the folder, perhaps from a stranger:
``check_inside`` refuses links that lead out of it and everything that is neither file nor folder, and the functions that write
there replace a link instead of following it. What the user *typed* (``--json``, ``--out``, ``--save``) is obeyed:
``write_output`` writes through a link, a pipe or ``/dev/null`` and leaves it what it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import IO, Any

from clead.errors import UserError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JSON_LIMIT = 256 * 2**20
"""Bytes of a record, a log or a journal that are read: far more than a million images need."""

# 0 where the system has no such flag (Windows).
_NOFOLLOW, _NONBLOCK, _CLOEXEC, _NOCTTY, _BINARY = (
    getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "CLOEXEC", "NOCTTY", "BINARY")
)
_CAREFUL = _NONBLOCK | _CLOEXEC | _NOCTTY | _BINARY
_PATIENCE = 5.0  # seconds that a FIFO may wait for its reader

written = 0
"""Files that this process has written: where there are some, a failed print has lost nothing."""


def kind_of(mode: int) -> str:
    """Return what a file of this ``st_mode`` is.

    >>> kind_of(os.stat(os.devnull).st_mode)
    'a device'
    """
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


# ------------------------------------------------------------------------------------------------ reading


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of ``limit`` bytes at most; a FIFO or device is refused without being opened.

    Raises UserError, or FileNotFoundError if there is nothing at ``path``.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= (most := min(limit, _memory())):
            content = file.read(max(size, 2**20))  # files of /proc say that they have no bytes
            if len(content) <= most:
                return content
            size = len(content)
    raise UserError(f"{path} has {size} bytes, at most {most} are read; replace it by the right file, or remove it")


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; raises UserError for anything else, FileNotFoundError if there is nothing."""
    try:
        _check_regular(path, os.stat(path).st_mode)
        handle = os.open(path, os.O_RDONLY | _CAREFUL)
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); mend its permissions or its path") from None
    file = os.fdopen(handle, "rb")
    try:
        _check_regular(path, os.fstat(handle).st_mode)
    except UserError:
        file.close()
        raise
    return file


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} must be a file, it is {kind_of(mode)}; give the path of a file, or remove it")


def read_json(path: Path, limit: int = JSON_LIMIT, *, remedy: str = "copy it again, or remove it") -> Any:
    """Return what a JSON file holds; raises UserError if it is damaged, FileNotFoundError if there is none."""
    content = read_regular(path, limit)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({_json_reason(error)}); {remedy}") from None


def read_json_lines(path: Path, limit: int = JSON_LIMIT, *, remedy: str = "remove that line") -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, none if there is no file.

    A last line that a kill or a full disk cut off is left out; raises UserError naming any other line that is no JSON object, with
    what to do about it (``remedy``).
    """
    try:
        content = read_regular(path, limit)
    except FileNotFoundError:
        return []
    lines, objects = content.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a JSON object is expected, got {type(value).__name__}")
            objects.append(value)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not content.endswith(b"\n"):
                break
            raise UserError(f"{path} line {number} is damaged ({_json_reason(error)}); {remedy}") from None
    return objects


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "not text"
    return first_line(error)


def _memory() -> int:
    """Return the bytes of memory that this machine has: a sparse file may claim more."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


# ------------------------------------------------------------------------------------------------ folders


def check_inside(root: Path, what: str = "run", *, only: str = "") -> None:
    """Raise UserError if something in the folder ``root`` leads outside it, or is neither a file nor a folder.

    ``root`` itself may be a link: the user typed it. Links between files of the folder are fine. Where a folder may hold other
    things too, ``only`` is how the names in ``root`` begin that matter.
    """
    real = os.path.realpath(root)
    waiting: list[str | Path] = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if folder is root and not entry.name.startswith((only, f".{only}")):
                        continue
                    if entry.is_symlink():
                        _check_link(entry.path, real, what)
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        kind = kind_of(entry.stat(follow_symlinks=False).st_mode)
                        raise UserError(f"{entry.path} is {kind}, which a {what} does not hold; remove it")
        except FileNotFoundError:  # removed meanwhile, or there is no such folder
            continue
        except NotADirectoryError:
            raise UserError(f"{root} is a file, a {what} is a folder; give the folder") from None
        except OSError as error:
            raise UserError(
                f"{error.filename or root} cannot be read ({_reason(error)}); mend its permissions"
            ) from None


def _check_link(path: str, root: str, what: str) -> None:
    target = os.path.realpath(path)
    if target != root and not target.startswith(os.path.join(root, "")):
        raise UserError(
            f"{path} is a link to {target}, outside the {what}; remove it, or put a copy of the file in its place: "
            "nothing outside the folder is read or written"
        )
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} is a link that cannot be followed ({_reason(error)}); remove it") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a link to {kind_of(mode)}, which a {what} does not hold; remove it")


def remove_tree_inside(path: Path) -> None:
    """Remove a folder with all it holds; of a link only the link, never what it points to. Errors are passed over."""
    with contextlib.suppress(OSError):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)  # which removes links in it, and does not follow them


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove what a kill in the middle of ``write_atomically`` left in ``folder`` of the files called ``names``."""
    for left in folder.glob(".*"):
        if left.name.startswith(tuple(f".{name}." for name in names)):
            with contextlib.suppress(IsADirectoryError, PermissionError, FileNotFoundError):
                left.unlink()


@contextlib.contextmanager
def locked(folder: Path, message: str) -> Generator[None, None, None]:
    """Keep other processes out of ``folder``, which is made if need be, while the block runs.

    The lock goes with the process that holds it, however that ends, and leaves no file. Raises UserError(message) if another
    process has it. Without locks (Windows, some network file systems) two processes at once are the user's affair.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if fcntl is None or handle is None:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(message) from None
        except OSError:  # no locks on this file system
            pass
        yield
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------ writing


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises UserError if the disk refuses, and leaves what was there before.

    A link at ``path`` is replaced, not followed. A file that is replaced leaves its permissions and owner to the new one, a new one
    has what the umask allows. Anything else that is there is refused.
    """
    global written
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _existing(path)
        temporary, file = _temporary(path)
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if before is not None and hasattr(os, "fchmod"):
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    with contextlib.suppress(OSError):
                        os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode) & 0o777)
        os.replace(temporary, path)
        written += 1
    except (OSError, ValueError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, UserError):
            raise
        raise _cannot_write(path, error) from error
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _existing(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file that is there; None if there is none, or a link that will be replaced."""
    try:
        before = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(before.st_mode):
        return before
    if not stat.S_ISLNK(before.st_mode):
        raise UserError(
            f"cannot write {path}: it is {kind_of(before.st_mode)}; remove it, or choose another name or directory"
        )
    return None


def _temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """Make a new file beside ``path``, with the permissions that the umask allows, of a name that no name is too long for."""
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC | _BINARY
    return temporary, os.fdopen(os.open(temporary, flags, 0o666), "wb")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file inside a run, never through a link, symbolic or hard; raises UserError if the disk refuses."""
    global written
    content = line.encode("utf-8", "backslashreplace") + b"\n"
    try:
        with _open_own(path, os.O_APPEND | os.O_CREAT) as file:
            file.write(content)
        written += 1
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}; free some space, then --resume") from error


def truncate(path: Path, size: int) -> None:
    """Cut a file inside a run back to ``size`` bytes, never through a link; shorter ones stay as they are."""
    try:
        with _open_own(path, 0) as file:
            if os.fstat(file.fileno()).st_size > size:
                os.ftruncate(file.fileno(), size)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(path, error) from error


def unshare(path: Path) -> None:
    """Give a file inside a run its own content where it is a hard link, so that appending changes no other file."""
    with contextlib.suppress(FileNotFoundError):
        _open_own(path, 0).close()


def _open_own(path: Path, flags: int) -> IO[bytes]:
    """Open a file inside a run for writing: a regular one, that has no other name."""
    flags |= os.O_WRONLY | _NOFOLLOW | _CAREFUL
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            kind = kind_of(os.lstat(path).st_mode)
            raise UserError(f"cannot write {path}: it is {kind}, not a file; remove it") from None
        raise
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(handle)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"cannot write {path}: it is {kind_of(about.st_mode)}, not a file; remove it")
        write_atomically(path, read_regular(path, sys.maxsize))
        handle = os.open(path, flags, 0o666)
    return os.fdopen(handle, "ab" if flags & os.O_APPEND else "wb", buffering=0)


def write_output(path: Path, content: bytes) -> None:
    """Write what the user named on the command line: a file whole or not at all; anything else is written through.

    A link stays and the file that it points to is replaced; ``/dev/null``, ``/dev/stdout``, a terminal and a FIFO are written to.
    Raises UserError if the disk refuses, nobody reads the FIFO, or the path is a folder, a socket or a disk.
    """
    stream = _own_descriptor(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    if stream is None and (mode is None or stat.S_ISREG(mode)):
        target = Path(os.path.realpath(path)) if os.path.islink(path) else path
        if mode is not None and not os.access(target, os.W_OK):
            raise UserError(f"cannot write {path}: it is read-only; make it writable (chmod u+w), or give another name")
        write_atomically(target, content)
        return
    if stream is None and mode is not None and not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise _not_an_output(path, mode)
    try:
        sys.stdout.flush()
        with os.fdopen(_open_sink(path) if stream is None else os.dup(stream), "wb") as file:
            os.set_blocking(file.fileno(), True)  # a full pipe is waited for
            file.write(content)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def _open_sink(path: Path) -> int:
    """Open a FIFO or character device for writing; a FIFO waits some seconds for its reader."""
    late = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.open(path, os.O_WRONLY | _CAREFUL)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > late:
                raise UserError(
                    f"cannot write {path}: nobody reads this FIFO; start its reader first, or give a file's name"
                ) from None
        time.sleep(0.05)


def check_output(path: Path) -> None:
    """Raise UserError if ``write_output`` could not write there: before hours of work, not after."""
    if _own_descriptor(path) is not None:
        return
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
            raise _not_an_output(path, mode)
        folder = Path(os.path.realpath(path)).parent
        writable = os.access(path, os.W_OK) and (not stat.S_ISREG(mode) or os.access(folder, os.W_OK))
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    if not writable:
        raise UserError(f"cannot write {path}: it or its folder is read-only, or no folder; give another name")


def _own_descriptor(path: Path) -> int | None:
    """Return the number of the open file of this process that a path such as ``/dev/stdout`` stands for: it is never replaced.

    >>> _own_descriptor(Path("/dev/stdout")), _own_descriptor(Path("/dev/fd/63")), _own_descriptor(Path("/dev/null"))
    (1, 63, None)
    """
    number = re.fullmatch(r"(?:/dev/fd|/proc/self/fd)/(\d{1,6})", str(path))
    return int(number[1]) if number else {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))


def _not_an_output(path: Path, mode: int) -> UserError:
    return UserError(f"cannot write {path}: it is {kind_of(mode)}; give the name of a file")


def _cannot_write(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot write {path}: {_reason(error)}; free some space or choose another directory")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
