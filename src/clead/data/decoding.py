"""Encoded image files to one uint8 tensor: decoded once, in parallel, cached by content."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clead.errors import UserError, first_line
from clead.renamed import old_names

log = logging.getLogger("clead")

WEB_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP")
"""The formats that a server takes from a client."""

FORMATS = (*WEB_FORMATS, "GIF", "TIFF", "AVIF", "JPEG2000")
"""The formats that are tried in a data set; a file's content decides, not its name."""

CACHE_ABOVE = 2000
"""Smaller collections decode faster than a cache is worth."""

_CHUNK = 256
_THREADS_ABOVE = 2048  # mean bytes; below, Python's own work per image outweighs what threads can share
_WORKING_PIXELS = 2**24  # a resize may always make so many on its way
_LONGEST_SIDE = 2**22  # above, the filter's weights alone take 16 bytes a pixel of it
_lock = threading.Lock()
_COLOURS = {"white": 255, "black": 0}
REMARKS = {
    "frames": "{} image files have more than one frame; the first is taken",
    "alpha": "{} images have transparent pixels, which are composed on {background} (data.background)",
    "dark": (
        "{} images of 16 bits have no value above 4095 (12 bits?) and are nearly black in 8 bits; scale their values to 0 … 65535"
    ),
}
"""What ``decode`` counts, and how to say it."""


class ResizeSpec(NamedTuple):
    """How images come to one shape: side in pixels, (height, width), or None, "squash" or "crop", channels 1, 3 or None.

    ``background``, "white" or "black", is what transparent pixels are composed on; None: transparency is dropped.
    """

    image_size: int | tuple[int, int] | None = None
    resize: str = "squash"
    channels: int | None = None
    background: str | None = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width, or None where they stay."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


def decode(
    blobs: Sequence[bytes], names: Sequence[str], fit: ResizeSpec, *, remarks: Counter[str] | None = None
) -> Tensor:
    """Decode encoded images to (N, C, H, W) uint8.

    EXIF orientation is honoured, transparency is composed on ``fit.background``, the first of several frames is taken, 16-bit grey
    is scaled to 8 bits. All threads together decode ``Image.MAX_IMAGE_PIXELS`` pixels at once at most. More than ``CACHE_ABOVE``
    images are remembered under ``$CLEAD_CACHE`` (else ``~/.cache/clead/decoded``), keyed by their bytes, ``fit`` and Pillow's
    version.

    Args:
        blobs: the files' bytes.
        names: what to call each image in an error, such as its path or row.
        fit: target size, channels and background.
        remarks: how many images each of ``REMARKS`` is about is added here.

    Raises:
        UserError: an image is unreadable, truncated or a decompression bomb, or its values do not fit into 8 bits; or sizes differ
            and ``fit.image_size`` is None; or all images together are larger than this machine's memory.
    """
    if blobs:
        _check_memory(blobs[0], len(blobs), fit)
    cache = _cache_file(blobs, fit) if len(blobs) > CACHE_ABOVE else None
    counted: Counter[str] = Counter()
    if cache is not None and (images := read_cache(cache, len(blobs), counted)) is not None:
        if remarks is not None:
            remarks.update(counted)
        return images
    Image.init()  # once, before the threads

    def run(start: int) -> list[np.ndarray]:
        rows, chunk_remarks = slice(start, start + _CHUNK), Counter()
        arrays = [
            decode_one(blob, name, fit, chunk_remarks) for blob, name in zip(blobs[rows], names[rows], strict=True)
        ]
        with _lock:
            counted.update(chunk_remarks)
        return arrays

    if len(blobs) <= _CHUNK:  # one piece of work: starting a thread for it takes longer than a small image
        arrays = run(0)
    else:
        workers = os.cpu_count() if sum(map(len, blobs)) > _THREADS_ABOVE * len(blobs) else 1
        with ThreadPoolExecutor(workers) as pool:
            arrays = [array for chunk in pool.map(run, range(0, len(blobs), _CHUNK)) for array in chunk]
    images = stack(arrays, names)
    if cache is not None:
        write_cache(cache, images, counted)
    if remarks is not None:
        remarks.update(counted)
    return images


class _PixelBudget:
    """Lets threads work on ``Image.MAX_IMAGE_PIXELS`` pixels at once at most; on a larger image, one alone."""

    def __init__(self) -> None:
        self._changed, self._taken = threading.Condition(), 0

    @contextmanager
    def of(self, pixels: int) -> Generator[None]:
        limit = Image.MAX_IMAGE_PIXELS or pixels
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + pixels <= limit)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_budget = _PixelBudget()


def _check_memory(first: bytes, count: int, fit: ResizeSpec) -> None:
    """Raise UserError if ``count`` images of the first one's size are more than this machine's memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with Image.open(io.BytesIO(first), formats=FORMATS) as image:
            height, width = fit.shape or (image.height, image.width)
    except Exception:  # not known here, or not readable, which decoding says better
        return
    if (needed := count * width * height * (fit.channels or 3)) > memory:
        raise UserError(
            f"{count} images of {width}x{height} pixels take {needed / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}; set "
            f"a smaller --data.image_size, for instance {min(width, height, 512) // 2}, or leave them on the disk: --data.name "
            "parquet_stream"
        )


def readable(blobs: Sequence[bytes], names: Sequence[str], fit: ResizeSpec) -> list[bool]:
    """Say of each image whether ``decode`` can read it."""
    Image.init()

    def one(blob: bytes, name: str) -> bool:
        try:
            decode_one(blob, name, fit)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, blobs, names))


def fit_arrays(images: Tensor, fit: ResizeSpec) -> Tensor:
    """Bring decoded images (N, C, H, W) uint8, C 1 or 3, to what ``fit`` asks; themselves if they agree."""
    _, channels, height, width = images.shape
    size_agrees = fit.shape in (None, (height, width))
    if size_agrees and fit.channels in (None, channels):
        return images
    arrays = images.permute(0, 2, 3, 1).numpy()
    arrays = arrays[..., 0] if channels == 1 else arrays
    return stack([_fit_one(Image.fromarray(np.ascontiguousarray(array)), fit) for array in arrays], [])


def cache_folder() -> Path:
    """Return where decoded images are remembered: ``$CLEAD_CACHE``, else ``~/.cache/clead/decoded``."""
    return Path(os.environ.get("CLEAD_CACHE") or "~/.cache/clead/decoded").expanduser()


def decode_one(
    blob: bytes, name: str, fit: ResizeSpec, remarks: Counter[str] | None = None, *, enough: int | None = None
) -> np.ndarray:
    """Return one image, (H, W) for grey and (H, W, 3) for colour, uint8; ``remarks`` and what it raises as for ``decode``.

    A JPEG file may come at a half, quarter or eighth of its size, with sides of ``enough`` pixels at least, which is faster.
    """
    remarks = Counter() if remarks is None else remarks
    try:
        image = Image.open(io.BytesIO(blob), formats=FORMATS)
        # Pillow itself only warns up to twice the limit.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        if enough is not None:
            image.draft(None, (enough, enough))
        remarks["frames"] += bool(getattr(image, "is_animated", False))
        with _budget.of(image.width * image.height):
            return _fit_one(_upright(image, fit.background, remarks), fit)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{name}: an image may have {Image.MAX_IMAGE_PIXELS} pixels at most, this one has more (a "
            "decompression bomb?); shrink it or remove it"
        ) from None
    except MemoryError:
        raise
    except _NotEightBits as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        detail = "unknown format" if unknown else first_line(error)
        raise UserError(
            f"{name}: not a readable image ({detail}, {len(blob)} bytes); replace or remove it "
            f"(read: {', '.join(FORMATS)})"
        ) from None


class _NotEightBits(ValueError):
    """The values of an image have no obvious place in 0 … 255."""


def _upright(image: Image.Image, background: str | None, remarks: Counter[str]) -> Image.Image:
    """Return the first frame, turned as its EXIF says, in mode L or RGB."""
    image = ImageOps.exif_transpose(image) if image.getexif() else image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _to_eight_bits(np.asarray(image), remarks)
    if image.mode == "F":
        low, high = (float(extreme(np.asarray(image))) for extreme in (np.min, np.max))
        raise _NotEightBits(
            f"pixels must be 8 or 16 bits, got floating point from {low:g} to {high:g}; save it as 8 bits, for instance with "
            'PIL.Image.fromarray((255 * values).round().astype("uint8")).save("NAME.png") for values in [0, 1]'
        )
    grey = image.mode in ("1", "L", "LA", "La")
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if transparent and background is not None:
        layers = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if np.asarray(layers.getchannel("A")).min() < 255:
            remarks["alpha"] += 1
            level = _COLOURS[background]
            composed = Image.alpha_composite(Image.new("RGBA", layers.size, (level, level, level, 255)), layers)
            return composed.getchannel("R") if grey else composed.convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    if grey:
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way that Pillow asks for
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, remarks: Counter[str]) -> Image.Image:
    """Return the high bytes of 16-bit values (H, W); raises where the values are no 16 bits, or nothing would be left of them."""
    low, high = int(values.min()), int(values.max())
    as_bytes = (np.asarray(values).clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
    if low < 0 or high > 65535 or (low < high and as_bytes.min() == as_bytes.max()):
        raise _NotEightBits(
            f"grey values of more than 8 bits must fill 0 to 65535, got {low} to {high}, which 8 bits would not show; save it as 8 "
            'bits, for instance with PIL.Image.fromarray((255 * (values / values.max())).astype("uint8")).save("NAME.png")'
        )
    remarks["dark"] += 0 < high < 4096
    return Image.fromarray(as_bytes)


def _fit_one(image: Image.Image, fit: ResizeSpec) -> np.ndarray:
    if fit.channels is not None:
        image = image.convert("L" if fit.channels == 1 else "RGB")
    size = fit.image_size
    if isinstance(size, tuple):
        if image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    elif size is not None and image.size != (size, size):
        if fit.resize == "crop":
            image = _resize_and_crop(image, size)
        else:
            # Pillow makes rows of the new length first.
            large = size * image.height > max(_WORKING_PIXELS, image.width * image.height, 4 * size**2)
            image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=_gap(image, large))
    return np.asarray(image)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the middle of the image, ``size`` pixels of each side; its shorter side becomes ``size``."""
    shorter = min(image.size)
    scale = size / shorter
    width, height = (max(size, round(side * scale)) for side in image.size)
    large = width * height > max(_WORKING_PIXELS, 4 * size**2)
    if (
        large or max(image.size) > _LONGEST_SIDE
    ):  # the same picture but for rounding, without the parts that are cut off
        left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _gap(image: Image.Image, large: bool) -> float | None:
    """Return how much larger than the result an image may stay before it is filtered; None: as it is."""
    return 3.0 if large or max(image.size) > _LONGEST_SIDE else None


def stack(arrays: list[np.ndarray], names: Sequence[str]) -> Tensor:
    """Return images as one tensor, (N, C, H, W): colour if any image is; raises as ``decode`` does where sizes differ."""
    sizes = Counter(array.shape[:2] for array in arrays)
    if len(sizes) > 1:
        (common, _), *_ = sizes.most_common()
        odd = next(index for index, array in enumerate(arrays) if array.shape[:2] != common)
        height, width = arrays[odd].shape[:2]
        raise UserError(
            f"{names[odd]}: the image is {width}x{height} pixels, most are {common[1]}x{common[0]}; set "
            f"--data.image_size, for instance {min(common)}, to resize them all"
        )
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2) for array in arrays]
        return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2)).contiguous()
    return torch.from_numpy(np.stack(arrays)[:, None])


def _cache_file(blobs: Sequence[bytes], fit: ResizeSpec) -> Path | None:
    digest = hashlib.sha256(f"2 {PIL.__version__} {tuple(fit)}".encode())
    for blob in blobs:
        digest.update(len(blob).to_bytes(8, "little"))
        digest.update(blob)
    try:
        return cache_folder() / f"{digest.hexdigest()[:40]}.safetensors"
    except RuntimeError:  # no home folder
        return None


def read_cache(path: Path, count: int, remarks: Counter[str] | None = None) -> Tensor | None:
    """Return the remembered images, or None if there are none or they are damaged; their remarks are added."""
    try:
        if not path.is_file() or not _trusted(path):
            return None
        with safe_open(path, "pt") as file:
            images, about = file.get_tensor("images"), (file.metadata() or {}).get("about", "")
    except (OSError, SafetensorError) as error:
        log.warning("ignoring the damaged cache %s (%s)", path, error)
        return None
    counts = about.split(" ")[0]
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != count or about != _about(images, counts):
        log.warning("ignoring the damaged cache %s (wrong content)", path)
        return None
    if remarks is not None:
        remarks.update(dict(zip(REMARKS, map(int, counts.split(",")), strict=True)))
    return images


def write_cache(path: Path, images: Tensor, remarks: Counter[str] | None = None) -> None:
    """Remember uint8 values of four dimensions; atomically; a folder that cannot be written to is no error."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _trusted(path):
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        counts = ",".join(str((remarks or {}).get(key, 0)) for key in REMARKS)
        save_file({"images": images}, temporary, metadata={"about": _about(images, counts)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        log.info("decoded images are not cached: %s", error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _about(images: Tensor, counts: str) -> str:
    """Return the remarks' counts and a checksum of both."""
    return f"{counts} {zlib.crc32(images.numpy(), zlib.crc32(counts.encode())):08x}"


def _trusted(path: Path) -> bool:
    """Say whether only this user can have written a file of the cache: a checksum does not tell who did."""
    if not hasattr(os, "geteuid"):
        return True
    for each in (path.parent, path):
        try:
            about = os.lstat(each) if each == path else os.stat(each)
        except FileNotFoundError:
            continue
        if each == path and not stat.S_ISREG(about.st_mode):
            log.warning("the cache %s is not used: it is no file", path)
            return False
        if about.st_uid != os.geteuid() or about.st_mode & stat.S_IWOTH:
            log.warning(
                "the cache %s is not used: another user can write there; set CLEAD_CACHE to a folder of your own", each
            )
            return False
    return True


__getattr__ = old_names(__name__, {"Fit": "ResizeSpec"})
