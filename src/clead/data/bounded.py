"""Reading no more than a file can honestly hold: a few bytes may claim, or unpack to, gigabytes."""

from __future__ import annotations

import gzip
import io
import math
import sys
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from clead.atomic_io import read_regular
from clead.errors import UserError, first_line

UNPACKED_ABOVE, UNPACKED_RATIO = 2**28, 100
_BLOCK = 2**20
HEAD = 10_500
"""The bytes that a NumPy header lies in: NumPy itself reads none of more than 10,000."""


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
        return read_regular(path, sys.maxsize)
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


class NpyHeader(NamedTuple):
    """What the header of a ``.npy`` file says: shape, type, whether columns come first, and where the values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    column_major: bool
    offset: int

    @property
    def bytes(self) -> int:
        """The bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def npy_header(head: bytes, size: int, name: str) -> NpyHeader:
    """Parse the first ``HEAD`` bytes of a ``.npy`` file of ``size`` bytes.

    Raises:
        UserError: it is no array in NumPy's format, holds Python objects, or is not as long as its header says.
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read_header(file)
    except Exception as error:  # NumPy raises whatever a broken header makes it raise
        raise UserError(f"{name}: not a NumPy array ({first_line(error)}); write it with numpy.save") from None
    if dtype.hasobject:
        raise UserError(
            f"{name}: holds Python objects ({dtype}), which may run code when read and are refused; write plain arrays: "
            "numpy.stack(images).astype(numpy.uint8), or numpy.array(names, dtype=str)"
        )
    header = NpyHeader(shape, dtype, column_major, file.tell())
    if any(side < 0 for side in shape) or header.bytes != size - header.offset or dtype.itemsize == 0:
        raise UserError(
            f"{name}: the header says {dtype} {shape}, {header.bytes} bytes, got {size - header.offset}; fetch or write it again"
        )
    return header


def read_npy(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read an array in NumPy's format from a file of ``size`` bytes; raises UserError as ``npy_header`` does."""
    head = file.read(HEAD)
    header = npy_header(head, size, name)
    content = b"".join([head[header.offset :], file.read(size - len(head))])
    if len(content) != header.bytes:
        raise UserError(f"{name}: ends before its header says; fetch it again")
    flat = np.frombuffer(content, dtype=header.dtype)
    return flat.reshape(header.shape, order="F" if header.column_major else "C")


def map_npy(path: Path) -> np.ndarray:
    """Return the array of a ``.npy`` file, left on the disk; raises UserError as ``npy_header`` does."""
    try:
        with path.open("rb") as file:
            header = npy_header(file.read(HEAD), path.stat().st_size, str(path))
        if not header.bytes:
            return np.empty(header.shape, header.dtype)
        order = "F" if header.column_major else "C"
        return np.memmap(path, dtype=header.dtype, mode="r", offset=header.offset, shape=header.shape, order=order)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its permissions or fetch it again") from None
