"""Encoded image files to one uint8 tensor: decoded once, in parallel, cached by content."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clead.errors import UserError

log = logging.getLogger("clead")

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP")
"""The formats that are tried; a file's content decides, not its name."""

CACHE_ABOVE = 2000
"""Smaller collections decode faster than a cache is worth."""

_CHUNK = 256
_THREADS_ABOVE = 2048  # mean bytes; below, Python's own work per image outweighs what threads can share


class Fit(NamedTuple):
    """How images come to one shape: side in pixels or None, "squash" or "crop", channels 1, 3 or None."""

    image_size: int | None = None
    resize: str = "squash"
    channels: int | None = None


def decode(blobs: Sequence[bytes], names: Sequence[str], fit: Fit) -> Tensor:
    """Decode encoded images to (N, C, H, W) uint8.

    EXIF orientation is honoured, transparency is dropped, 16-bit grey is scaled to 8 bits. More than
    ``CACHE_ABOVE`` images are remembered under ``$CLEAD_CACHE`` (else ``~/.cache/clead/decoded``), keyed by
    their bytes, ``fit`` and Pillow's version.

    Args:
        blobs: the files' bytes.
        names: what to call each image in an error, such as its path or row.
        fit: target size and channels.

    Raises:
        UserError: an image is unreadable, truncated or a decompression bomb; or sizes differ and
            ``fit.image_size`` is None.
    """
    cache = _cache_file(blobs, fit) if len(blobs) > CACHE_ABOVE else None
    if cache is not None and (images := read_cache(cache, len(blobs))) is not None:
        return images
    Image.init()  # once, before the threads

    def run(start: int) -> list[np.ndarray]:
        part = slice(start, start + _CHUNK)
        return [decode_one(blob, name, fit) for blob, name in zip(blobs[part], names[part], strict=True)]

    if len(blobs) <= _CHUNK:  # one piece of work: starting a thread for it takes longer than a small image
        arrays = run(0)
    else:
        workers = os.cpu_count() if sum(map(len, blobs)) > _THREADS_ABOVE * len(blobs) else 1
        with ThreadPoolExecutor(workers) as pool:
            arrays = [array for chunk in pool.map(run, range(0, len(blobs), _CHUNK)) for array in chunk]
    images = stack(arrays, names)
    if cache is not None:
        write_cache(cache, images)
    return images


def readable(blobs: Sequence[bytes], names: Sequence[str], fit: Fit) -> list[bool]:
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


def fit_arrays(images: Tensor, fit: Fit) -> Tensor:
    """Bring decoded images (N, C, H, W) uint8, C 1 or 3, to what ``fit`` asks; themselves if they agree."""
    _, channels, height, width = images.shape
    size_agrees = fit.image_size is None or height == width == fit.image_size
    if size_agrees and fit.channels in (None, channels):
        return images
    arrays = images.permute(0, 2, 3, 1).numpy()
    arrays = arrays[..., 0] if channels == 1 else arrays
    return stack([_fit_one(Image.fromarray(np.ascontiguousarray(array)), fit) for array in arrays], [])


def cache_folder() -> Path:
    """Return where decoded images are remembered: ``$CLEAD_CACHE``, else ``~/.cache/clead/decoded``."""
    return Path(os.environ.get("CLEAD_CACHE") or "~/.cache/clead/decoded").expanduser()


def decode_one(blob: bytes, name: str, fit: Fit) -> np.ndarray:
    """Return one image, (H, W) for grey and (H, W, 3) for colour, uint8; raises as ``decode`` does."""
    try:
        image = Image.open(io.BytesIO(blob), formats=FORMATS)
        # Pillow itself only warns up to twice the limit.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return _fit_one(_upright(image), fit)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{name}: an image may have {Image.MAX_IMAGE_PIXELS} pixels at most, this one has more (a "
            "decompression bomb?); shrink it or remove it"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        detail = "unknown format" if unknown else next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{name}: not a readable image ({detail}, {len(blob)} bytes); replace or remove it "
            f"(read: {', '.join(FORMATS)})"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF says, in mode L or RGB."""
    image = ImageOps.exif_transpose(image) if image.getexif() else image
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way that Pillow asks for
    return image.convert("RGB")


def _fit_one(image: Image.Image, fit: Fit) -> np.ndarray:
    if fit.channels is not None:
        image = image.convert("L" if fit.channels == 1 else "RGB")
    size = fit.image_size
    if size is not None and image.size != (size, size):
        if fit.resize == "crop":
            scale = size / min(image.size)
            image = image.resize(
                (max(size, round(image.width * scale)), max(size, round(image.height * scale))),
                Image.Resampling.BILINEAR,
            )
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        else:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


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


def _cache_file(blobs: Sequence[bytes], fit: Fit) -> Path | None:
    digest = hashlib.sha256(f"1 {PIL.__version__} {tuple(fit)}".encode())
    for blob in blobs:
        digest.update(len(blob).to_bytes(8, "little"))
        digest.update(blob)
    try:
        return cache_folder() / f"{digest.hexdigest()[:40]}.safetensors"
    except RuntimeError:  # no home folder
        return None


def read_cache(path: Path, count: int) -> Tensor | None:
    """Return the remembered images, or None if there are none or they are damaged."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            images, checksum = file.get_tensor("images"), (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError) as error:
        log.warning("ignoring the damaged cache %s (%s)", path, error)
        return None
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != count or checksum != _crc32(images):
        log.warning("ignoring the damaged cache %s (wrong content)", path)
        return None
    return images


def write_cache(path: Path, images: Tensor) -> None:
    """Remember uint8 values of four dimensions; atomically; a folder that cannot be written to is no error."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file({"images": images}, temporary, metadata={"crc32": _crc32(images)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        log.info("decoded images are not cached: %s", error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _crc32(images: Tensor) -> str:
    return f"{zlib.crc32(images.numpy()):08x}"
