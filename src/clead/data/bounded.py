"""Reading no more than a file can honestly hold: a few bytes may claim, or unpack to, gigabytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from clead.errors import UserError

UNPACKED_ABOVE, UNPACKED_RATIO = 2**28, 100
_BLOCK = 2**20
_HEADER = 10_000  # bytes of a NumPy header; NumPy's own limit


def check_unpacked(path: Path, size: int) -> None:
    """Raise UserError if the file at ``path`` unpacks to more bytes, ``size``, than images would."""
    packed = path.stat().st_size
    if size > max(UNPACKED_ABOVE, UNPACKED_RATIO * packed):
        raise UserError(
            f"{path}: {packed} bytes that unpack to {size} are no images (a zip bomb?); images above {UNPACKED_ABOVE} bytes may "
            f"shrink to a {UNPACKED_RATIO}th at most: write it again from the original files"
        )


def read_file(path: Path) -> bytes:
    """Return a file's content; raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its permissions or fetch it again") from None


def read_gzip(path: Path) -> bytes:
    """Return what a gzip file unpacks to; raises UserError if it is damaged or unpacks to more than images would."""
    blocks, size = [], 0
    try:
        with gzip.open(path) as file:
            while block := file.read(_BLOCK):
                blocks.append(block)
                size += len(block)
                check_unpacked(path, size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    return b"".join(blocks)


def read_npy(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read an array in NumPy's format, checking that its header and the ``size`` of the file agree before anything is allocated.

    Raises:
        UserError: it is no array, holds Python objects, or is not as long as its header says.
    """
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read_header(file, max_header_size=_HEADER)
    except Exception as error:  # NumPy raises whatever a broken header makes it raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{name}: not a NumPy array ({reason}); write it with numpy.save") from None
    if dtype.hasobject:
        raise UserError(
            f"{name}: holds Python objects ({dtype}), which may run code when read and are refused; write plain arrays: "
            "numpy.stack(images).astype(numpy.uint8), or numpy.array(names, dtype=str)"
        )
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise UserError(
            f"{name}: the header says {dtype} {shape}, {math.prod(shape) * dtype.itemsize} bytes, got {size - file.tell()}; "
            "fetch it again"
        )
    content = file.read(size - file.tell())
    if math.prod(shape) * dtype.itemsize != len(content):
        raise UserError(f"{name}: ends before its header says; fetch it again")
    flat = np.frombuffer(content, dtype=dtype) if dtype.itemsize else np.zeros(math.prod(shape), dtype)
    return flat.reshape(shape, order="F" if column_major else "C")
