"""Training images that do not fit into memory: Parquet shards, read by row group, decoded when they are needed."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from clead.data.decoding import ResizeSpec, cache_folder, decode_one, read_cache, readable, stack, write_cache
from clead.errors import UserError, first_line, needs_extra

_log = logging.getLogger("clead")

_SAMPLED = 4096  # images of which mean and deviation are taken: the standard error of a mean is below 0.005


class _Group(NamedTuple):
    """A row group: which file, its number there, the number of its first row among all, and how many rows it has."""

    file: int
    number: int
    first: int
    rows: int


class Shards:
    """The encoded images of Parquet files, read one row group at a time.

    Args:
        files: at least one, in order.
        column: a struct with ``bytes``, or bytes.
        buffer: two windows of so many images, to the end of their last row group, are kept encoded: those used last.

    Raises UserError for a file that cannot be read or holds no row, MissingExtra without pyarrow.
    """

    def __init__(self, files: Sequence[Path], column: str, buffer: int) -> None:
        with needs_extra("data", "reading Parquet files"):
            import pyarrow.compute
            import pyarrow.parquet
        self.files, self.column = list(files), column
        self._pyarrow: Any = pyarrow
        self.stamps = [_stamp(file) for file in self.files]
        self.groups: list[_Group] = []
        digest, first = hashlib.sha256(), 0
        for number, file in enumerate(self.files):
            metadata = self._open(number).metadata
            if not metadata.num_rows:
                raise UserError(f"{file}: holds no row; remove the file, or write it again")
            # Rows, sizes, offsets and statistics of every row group; the pixels themselves would take a pass over everything.
            digest.update(_footer(file))
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                self.groups.append(_Group(number, group, first, rows))
                first += rows
        self.rows = first
        """Rows of all files."""
        self.fingerprint = digest.hexdigest()
        """Of the files' footers."""
        self.capacity = 2 * (buffer + max(group.rows for group in self.groups))
        self._firsts = np.array([group.first for group in self.groups])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the row group of each row, (n,) int64."""
        return np.searchsorted(self._firsts, rows, side="right") - 1

    def blobs(self, rows: np.ndarray, *, missing: bytes | None = None) -> list[bytes]:
        """Return the bytes of the images at ``rows``, (n,) int64; UserError if a file was changed.

        Where an image has none: ``missing``, or UserError if that is None.
        """
        groups = self.group_of(rows)
        blobs: list[bytes] = [b""] * len(rows)
        for number in np.unique(groups):
            column = self._column(int(number))
            for place in np.flatnonzero(groups == number):
                blob = column[int(rows[place]) - self.groups[number].first].as_py()
                blob = missing if blob is None else blob
                if blob is None:
                    name = self.name(int(rows[place]))
                    raise UserError(f"{name}: the image has no bytes (only a path?); write the file with them inside")
                blobs[place] = blob
        return blobs

    def name(self, row: int) -> str:
        """Return what to call an image in an error: its file and its row there."""
        group = self.groups[int(self.group_of(np.array([row]))[0])]
        start = next(other.first for other in self.groups if other.file == group.file)
        return f"{self.files[group.file]} row {row - start}"

    def _column(self, number: int) -> Any:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            group = self.groups[number]
            file = self.files[group.file]
            if _stamp(file) != self.stamps[group.file]:
                raise UserError(f"{file}: was changed while it was being read; put the old file back, or train anew")
            room = self.capacity - group.rows
            while self._kept and sum(self.groups[index].rows for index in self._kept) > room:
                self._kept.popitem(last=False)
            try:
                opened = self._open(group.file)
                encoded = str(opened.schema_arrow.field(self.column).type).endswith("binary")
                wanted = self.column if encoded else f"{self.column}.bytes"
                table = opened.read_row_group(group.number, columns=[wanted])
            except (OSError, self._pyarrow.ArrowException) as error:
                raise UserError(
                    f"{file}: row group {group.number} cannot be read ({first_line(error)}); fetch it again"
                ) from None
            column = table[self.column].combine_chunks()
            column = column if encoded else self._pyarrow.compute.struct_field(column, "bytes")
            self._kept[number] = column
            return column

    def _open(self, number: int) -> Any:
        try:
            return self._pyarrow.parquet.ParquetFile(self.files[number], page_checksum_verification=True)
        except (OSError, self._pyarrow.ArrowException) as error:
            raise UserError(
                f"{self.files[number]}: not a readable Parquet file ({first_line(error)}); fetch it again"
            ) from None


class StreamedImages:
    """Stands for a tensor (N, C, H, W) uint8 where training indexes one: what is asked for is read and decoded then.

    Memory holds the encoded images of two windows of ``buffer`` images, and the decoded ones of two batches.

    Args:
        shards: where the images are.
        rows: (N,) int64, which of the shards' rows these are.
        fit: side in pixels and channels; neither None.
        buffer: images among which ``shuffled`` mixes.
        workers: threads that decode.
    """

    dtype = torch.uint8
    device = torch.device("cpu")

    def __init__(self, shards: Shards, rows: Tensor, fit: ResizeSpec, *, buffer: int, workers: int) -> None:
        assert fit.shape is not None and fit.channels is not None
        self.shards, self.rows, self.fit = shards, rows, fit
        self.buffer, self.workers = buffer, workers
        self.shape = torch.Size((len(rows), fit.channels, *fit.shape))
        Image.init()  # once, before the threads
        self._pool = ThreadPoolExecutor(workers, "clead-decode")
        self._ahead = ThreadPoolExecutor(1, "clead-ahead")
        self._next: tuple[Tensor, Future[Tensor]] | None = None
        self._counts: Tensor | None = None
        self.remarks: Counter[str] = Counter()
        """What was seen in the images that were decoded so far; see ``decoding.REMARKS``."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Tensor | slice) -> Tensor:
        """Return decoded images, (n, C, H, W) uint8 on the CPU, at positions: a slice, or int64 or bool of one dimension."""
        chosen = self.rows[key.cpu() if isinstance(key, Tensor) else key]
        if self._next is not None:
            rows, future = self._next
            if torch.equal(rows, chosen):
                self._next = None
                return future.result()
        return self._decoded(chosen)

    def prefetch(self, positions: Tensor) -> None:
        """Begin to read and decode the images that are asked for next, in the background."""
        rows = self.rows[positions.cpu()]
        self._next = (rows, self._ahead.submit(self._decoded, rows))

    def at(self, index: Tensor) -> StreamedImages:
        """Return the images at ``index``, (n,) int64 or bool, without reading them."""
        return StreamedImages(self.shards, self.rows[index], self.fit, buffer=self.buffer, workers=self.workers)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images, decoded, ``size`` at once."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, *_: Any, **__: Any) -> StreamedImages:
        """Return itself: what is decoded is moved, batch by batch."""
        return self

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """Return an order of all positions, (N,) int64, that can be read window by window.

        Row groups come in random order, and images mix within windows of about ``buffer`` images, each of some row groups. Where
        several processes train, each reads all row groups, and decodes its own images.
        """
        groups = torch.from_numpy(self.shards.group_of(self.rows.numpy()))
        by_group = torch.argsort(groups, stable=True)
        places = list(by_group.split(torch.unique_consecutive(groups[by_group], return_counts=True)[1].tolist()))
        order = torch.randperm(len(places), generator=generator).tolist()
        return _by_window([places[number] for number in order], self.buffer, generator)

    def histogram(self) -> Tensor:
        """Return how often each value occurs per channel, (C, 256) int64, in at most 4096 images of evenly spaced row groups."""
        if self._counts is None:
            groups = self.shards.group_of(self.rows.numpy())
            present = np.unique(groups)
            taken = present[np.linspace(0, len(present) - 1, min(len(present), 32)).round().astype(int)]
            each = max(1, _SAMPLED // len(taken))
            counts = torch.zeros(self.shape[1], 256, dtype=torch.int64)
            for group in taken:
                rows = self.rows[torch.from_numpy(np.flatnonzero(groups == group)[:each])]
                for piece in rows.split(256):
                    for channel, values in enumerate(self._decoded(piece).unbind(1)):
                        counts[channel] += torch.bincount(values.reshape(-1), minlength=256)
            self._counts = counts
        return self._counts

    def _decoded(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        numbers = rows.numpy()
        blobs = self.shards.blobs(numbers)
        size = -(-len(blobs) // self.workers)

        def run(start: int) -> tuple[list[np.ndarray], Counter[str]]:
            rows, seen = slice(start, start + size), Counter()
            pairs = zip(blobs[rows], numbers[rows], strict=True)
            return [decode_one(blob, self.shards.name(int(row)), self.fit, seen) for blob, row in pairs], seen

        arrays = []
        for some, seen in self._pool.map(run, range(0, len(blobs), size)):
            arrays += some
            self.remarks.update(seen)
        return stack(arrays, [])


def _by_window(places: list[Tensor], buffer: int, generator: torch.Generator) -> Tensor:
    """Return the positions of row groups, mixed within windows of about ``buffer`` images."""
    window: list[Tensor] = []
    order: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    for turn, group in enumerate(places):
        window.append(group)
        if sum(map(len, window)) >= buffer or turn == len(places) - 1:
            mixed = torch.cat(window)
            order.append(mixed[torch.randperm(len(mixed), generator=generator)])
            window = []
    return torch.cat(order)


def unreadable(shards: Shards, fit: ResizeSpec) -> Tensor:
    """Return which images cannot be decoded, (N,) bool.

    It takes one pass over all of them, and is remembered where decoded images are (``$CLEAD_CACHE``) until a file changes.
    """
    key = hashlib.sha256(f"2 {PIL.__version__} {tuple(fit)} {shards.fingerprint} {shards.stamps}".encode())
    cache = cache_folder() / f"unreadable-{key.hexdigest()[:40]}.safetensors"
    if (known := read_cache(cache, shards.rows)) is not None:
        return known[:, 0, 0, 0].bool()
    _log.warning("looking once whether all %d images can be read (data.skip_unreadable)", shards.rows)
    broken = torch.zeros(shards.rows, dtype=torch.bool)
    for group in shards.groups:
        rows = np.arange(group.first, group.first + group.rows)
        blobs, names = shards.blobs(rows, missing=b""), [shards.name(int(row)) for row in rows]
        broken[group.first : group.first + group.rows] = ~torch.tensor(readable(blobs, names, fit), dtype=torch.bool)
    write_cache(cache, broken.byte()[:, None, None, None])
    return broken


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); put the file back") from None
    return status.st_size, status.st_mtime_ns


def _footer(file: Path) -> bytes:
    """Return a Parquet file's metadata as stored: at its end, before four bytes of its length and ``PAR1``."""
    with file.open("rb") as content:
        content.seek(-8, 2)
        length = int.from_bytes(content.read(4), "little")
        content.seek(-8 - length, 2)
        return content.read(length)
