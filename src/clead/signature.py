"""Whether a file was written by this user on this machine: signatures with a secret key that lies outside of every run.

A checksum finds damage; anybody can compute one. A signature cannot be made without the key, so a folder that came from elsewhere
cannot hold one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from clead.errors import UserError

_BYTES = 32


def key_file() -> Path | None:
    """Return where the key lies, ``$XDG_STATE_HOME/clead/key`` or ``~/.local/state/clead/key``; None without a home."""
    if folder := os.environ.get("XDG_STATE_HOME"):
        return Path(folder) / "clead" / "key"
    try:
        return Path.home() / ".local" / "state" / "clead" / "key"
    except RuntimeError:
        return None


def sign(text: str) -> str:
    """Return the signature of ``text``, in hex digits."""
    return hmac.new(_key(key_file())[0], text.encode(), hashlib.sha256).hexdigest()


def is_signed(text: str, signature: object) -> bool:
    """Say whether ``signature`` is what ``sign`` returned for ``text`` to this user on this machine."""
    return isinstance(signature, str) and hmac.compare_digest(sign(text).encode(), signature.encode())


def owned(path: Path) -> bool:
    """Say whether ``path`` itself, not what a link leads to, belongs to the user of this process."""
    with contextlib.suppress(OSError):
        return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()
    return False


def keyless() -> str:
    """Return why signatures end with this process, or nothing if the key is kept in a file."""
    return _key(key_file())[1]


@functools.cache
def _key(path: Path | None) -> tuple[bytes, str]:
    """Return the key and why it is not a lasting one; it is made on first use."""
    temporary = secrets.token_bytes(_BYTES)
    if path is None:
        return temporary, "there is no home directory for its key; set XDG_STATE_HOME"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            _create(path, temporary)
        key = path.read_bytes()
        status = path.lstat()
    except OSError as error:
        return temporary, f"its key {path} cannot be kept ({error.strerror or error}); set XDG_STATE_HOME"
    if not owned(path) or (os.name == "posix" and status.st_mode & 0o077):
        raise UserError(
            f"{path} signs the states of your evaluations, and others can read or change it; remove it: rm {path}"
        )
    if len(key) != _BYTES:
        raise UserError(f"{path} must hold {_BYTES} bytes, got {len(key)}; remove it: rm {path}")
    return key, ""


def _create(path: Path, key: bytes) -> None:
    """Write the key whole or not at all; raises FileExistsError if another process was first."""
    draft = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(key)
        os.link(draft, path)  # fails if the name is taken, and never shows half a key
    finally:
        draft.unlink()
