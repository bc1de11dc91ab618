"""A request's body to images, refused as early as possible: by its size, by its headers, before anything is decoded.

Nothing in a request is taken for a path or an address, nothing is written to a disk, and no pickle is read.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from clead.data.decoding import WEB_FORMATS, decode
from clead.errors import UserError
from clead.inference.models import ServedModel
from clead.inference.problems import Problem, first_error
from clead.inference.settings import ServeSettings

T = TypeVar("T")

SMALL = 65_536
"""Bodies up to so many bytes, and images up to so many pixels, are read at once: handing them to a thread takes longer."""

ARRAY = 1_048_576
"""Bodies of a .npy array up to so many bytes are read at once: it takes half a millisecond at most."""

NPY = "application/octet-stream"
_GRACE = 2.0  # seconds before a body's speed counts
_REFUSED = (  # what is often sent instead of an image that is read here
    (b"PK\x03\x04", "a zip archive"),
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF"),
    (b"II*\x00", "a TIFF"),
    (b"MM\x00*", "a TIFF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", f"a NumPy array (send it as {NPY})"),
)


class Arrays(BaseModel):
    """Images as nested lists (n, C, H, W) in the model's own size."""

    model_config = ConfigDict(extra="forbid")

    images: list[list[list[list[Annotated[float, Strict()]]]]] = Field(min_length=1)
    pixels: Literal["unit", "uint8"] = "unit"


def body_kind(request: Request) -> str:
    """Return the content type; raises Problem if it is none that is read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json", NPY) and not kind.startswith("image/"):
        known = (
            f"multipart/form-data with files, image/png (or another image), application/json, or {NPY} with a .npy file"
        )
        raise Problem(415, f"content-type: must be {known}, got {kind[:60] or 'none'!r}; set the header")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise Problem(415, f"content-encoding: bodies are read as they are, got {coding[:60]!r}; send it unpacked")
    if kind == "image/svg+xml":
        raise Problem(415, f"content-type: an SVG is no raster image; send one of {', '.join(WEB_FORMATS)}")
    return kind


async def read_images(
    request: Request, body: bytes, model: ServedModel, settings: ServeSettings, pool: ThreadPoolExecutor
) -> np.ndarray:
    """Return the images of a request's ``body``, (n, C, H, W) in the model's shape: uint8, or float32 in [0, 1].

    Files are brought to that shape the way the training's were; arrays must have it. Raises Problem.
    """
    kind = body_kind(request)
    if kind == "application/json":
        return await run(lambda: from_json(body, model, settings), pool if len(body) > SMALL else None)
    if kind == NPY:
        # Bytes are looked at where they lie; floats are compared and converted.
        return await run(lambda: from_npy(body, model, settings), pool if len(body) > ARRAY else None)
    files = await _files(request, body, settings) if kind == "multipart/form-data" else [body]
    size = max(count_pixels(files, settings.max_pixels), sum(map(len, files)))
    return await run(lambda: from_files(files, model), pool if size > SMALL else None)


async def run(work: Callable[[], T], pool: ThreadPoolExecutor | None) -> T:
    """Do small work at once (no ``pool``) and large work in a thread, so that one large request does not hold up the others."""

    def contained() -> T:
        try:
            return work()
        except Exception:
            raise
        except BaseException as error:  # such as SystemExit, which would end the event loop
            raise RuntimeError(f"{type(error).__name__} while answering a request") from error

    return contained() if pool is None else await asyncio.get_running_loop().run_in_executor(pool, contained)


class Buffers:
    """Counts the bytes of all requests that are in memory, ``limit`` together at most."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def take(self, size: int) -> None:
        """Count ``size`` more bytes; raises Problem 503 if they are too many."""
        if self.held + size > self.limit:
            text = f"the server holds {self.limit} bytes of requests already, which is its limit; come back in a second"
            raise Problem(503, text, {"Retry-After": "1", "Connection": "close"})
        self.held += size


@asynccontextmanager
async def read_body(
    request: Request, settings: ServeSettings, buffers: Buffers, limit: int | None = None
) -> AsyncGenerator[bytes, None]:
    """Give the body, which counts in ``buffers`` until the end of the context.

    Raises Problem: 413 if it is, or claims to be, longer than ``limit``, by default ``max_body``; 408 if it does not arrive within
    ``read_seconds``, or more slowly than ``min_rate`` after two seconds; 503 if ``buffers`` are full.
    """
    limit = settings.max_body if limit is None else limit
    text = f"body: at most {limit} bytes are read, got more; send fewer or smaller images"
    too_long = Problem(413, text, {"Connection": "close"})
    claimed = request.headers.get("content-length", "0")
    if not claimed.isdecimal() or len(claimed) > 18 or int(claimed) > limit:
        raise too_long
    body, counted, chunks = bytearray(), 0, request.stream()
    now = asyncio.get_running_loop().time
    start = now()
    try:
        while True:
            patience = min(settings.read_seconds, _GRACE + len(body) / settings.min_rate)
            try:
                chunk = await asyncio.wait_for(anext(chunks), max(0.0, start + patience - now()))
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                rule = f"within {settings.read_seconds:g} seconds"
                if patience < settings.read_seconds:
                    rule += f" and at {settings.min_rate} bytes per second or more"
                text = f"body: must arrive {rule}, it did not; send less, or over a faster line"
                raise Problem(408, text, {"Connection": "close"}) from None
            if len(body) + len(chunk) > limit:
                raise too_long
            buffers.take(len(chunk))
            counted += len(chunk)
            body += chunk
        yield bytes(body)
    finally:
        buffers.held -= counted


async def _files(request: Request, body: bytes, settings: ServeSettings) -> list[bytes]:
    """Return the files of a multipart body."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, whole(), max_files=settings.max_images, max_fields=0)
    parser.spool_max_size = settings.max_body + 1  # in memory: no image reaches the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise _too_many(settings, f"more than {settings.max_images}") from None
        if "Too many fields" in error.message:
            text = "form: must hold files under the name 'images' only, got a plain field; leave it out"
            raise Problem(422, text) from None
        raise Problem(400, f"form: broken multipart data ({error.message.rstrip('.')}); send it anew") from None
    except Exception as error:  # python-multipart meets broken bytes with many kinds
        raise Problem(400, f"form: broken multipart data ({type(error).__name__}); send it anew") from None
    files = []
    try:
        for name, value in form.multi_items():
            if name != "images" or not isinstance(value, UploadFile):
                raise Problem(422, f"form: files must be sent under the name 'images', got {name[:40]!r}; rename it")
            files.append(await value.read())
    finally:
        await form.close()
    if not files:
        raise Problem(422, "form: must hold at least one file under the name 'images', got none; add one")
    return files


def count_pixels(files: list[bytes], max_pixels: int) -> int:
    """Return the pixels of all files by their headers; Problem if they are too many, or if a file is none of the formats."""
    total = 0
    for number, file in enumerate(files):
        name = f"image {number}"
        if not file:
            raise Problem(422, f"{name}: must be an image file, got 0 bytes; send the file's content")
        try:
            with Image.open(io.BytesIO(file), formats=WEB_FORMATS) as image:
                width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            width = height = 10**6  # Pillow does not tell how many; no image file has as many
        except UnidentifiedImageError:
            text = f"{name}: must be one of {', '.join(WEB_FORMATS)}, got {_kind(file)}; convert it"
            raise Problem(415, text) from None
        except Exception as error:  # Pillow's readers raise whatever a broken header makes them raise
            raise Problem(422, f"{name}: not a readable image ({type(error).__name__}); replace it") from None
        total += width * height
        if total > max_pixels:
            given = f"more ({width}×{height} here)" if width < 10**6 else "more"
            text = f"{name}: the images of a request may have {max_pixels} pixels together, got {given}; shrink them"
            raise Problem(413, text)
    return total


def _kind(file: bytes) -> str:
    for start, name in _REFUSED:
        if file.startswith(start):
            return name
    if b"<svg" in file[:1024].lower():
        return "an SVG, which is no raster image"
    return f"an unknown format ({len(file)} bytes)"


def from_files(files: list[bytes], model: ServedModel) -> np.ndarray:
    """Return the decoded images, (n, C, H, W) uint8, resized as the training's were."""
    try:
        images = decode(files, [f"image {number}" for number in range(len(files))], model.fit)
    except UserError as error:
        raise Problem(422, str(error)) from None
    if tuple(images.shape[1:]) != model.shape:
        (_, height, width), given = model.shape, f"{images.shape[3]}×{images.shape[2]}"
        text = f"images: {model.name} was trained on images of {width}×{height} pixels, got {given}"
        raise Problem(422, f"{text}; resize them, as nothing did in its training")
    return images.numpy()


def from_json(body: bytes, model: ServedModel, settings: ServeSettings) -> np.ndarray:
    """Return the images of a JSON object {"images": [...], "pixels": "unit" | "uint8"}."""
    channels, height, width = model.shape
    most = settings.max_images
    # Counted first: millions of empty lists are a short body, and seconds of work. A few too many are told more exactly below.
    lists, numbers = most * (1 + channels * (1 + height)), most * channels * height * width
    if body.count(b"[") > 2 * lists + 1000 or body.count(b",") > 2 * numbers + 1000:
        text = f"images: at most {most} images of {channels}×{height}×{width} are read, got more lists or numbers than they have"
        raise Problem(422, f"{text}; send fewer, or of that shape")
    try:
        given = Arrays.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        if problems[0]["type"] == "json_invalid":
            raise Problem(400, "body: not JSON") from None
        raise Problem(422, first_error(problems)) from None
    if len(given.images) > most:
        raise _too_many(settings, str(len(given.images)))
    try:
        images = np.array(given.images, dtype=np.float64)
    except ValueError:
        text = "images: all rows, channels and images must be equally long, got lists of several lengths"
        raise Problem(422, text) from None
    if given.pixels == "unit":
        check_images(images, model, settings, 1)
        return images.astype(np.float32)
    check_images(images, model, settings, 255)
    integers = images.astype(np.uint8)
    if not (images == integers).all():
        index, value = _first(images != integers, images)
        raise Problem(422, f"images{index}: must be a whole number, got {value:g}; use pixels: unit")
    return integers


def from_npy(body: bytes, model: ServedModel, settings: ServeSettings) -> np.ndarray:
    """Return the images of a .npy file; its header is read by itself, for what it claims would be allocated."""
    file = io.BytesIO(body)
    try:
        numpy: Any = np.lib.format
        read = {(1, 0): numpy.read_array_header_1_0, (2, 0): numpy.read_array_header_2_0}[numpy.read_magic(file)]
        shape, fortran, dtype = read(file)
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError
    except Exception as error:  # NumPy's reader raises whatever a broken header makes it raise
        text = f"body: must be a .npy file as numpy.save writes it ({type(error).__name__}); send one"
        raise Problem(400, text) from None
    if dtype not in (np.uint8, np.float32, np.float64):
        raise Problem(422, f"array: must be uint8, float32 or float64, got {str(dtype)[:40]}; convert it")
    if math.prod(shape) * dtype.itemsize != len(body) - file.tell():
        text = f"array: its header speaks of shape {str(shape)[:60]}, which its length contradicts; save it anew"
        raise Problem(400, text)
    images = np.frombuffer(body, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    check_images(images, model, settings, 255 if images.dtype == np.uint8 else 1)
    return np.require(images, np.uint8 if images.dtype == np.uint8 else np.float32, ["C", "W"])


def check_images(images: np.ndarray, model: ServedModel, settings: ServeSettings, top: int) -> None:
    """Raise Problem unless ``images`` is (n, C, H, W) in the model's shape, 1 ≤ n ≤ max_images, with values in [0, ``top``]."""
    if images.ndim != 4 or images.shape[1:] != model.shape:
        expected, given = ("×".join(map(str, shape)) for shape in (model.shape, images.shape))
        text = f"images: {model.name} takes n×{expected} (images, channels, rows, columns), got {given or 'a single number'}"
        raise Problem(422, f"{text}; bring the array to that shape, or send image files, which are resized here")
    if not 1 <= len(images) <= settings.max_images:
        raise _too_many(settings, str(len(images)))
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= top):
        index, value = _first(~((images >= 0) & (images <= top)), images)
        text = f"images{index}: a pixel must be in [0, {top}], got {value:g}; rescale the array or repair it"
        raise Problem(422, text)


def _first(wrong: np.ndarray, images: np.ndarray) -> tuple[list[int], float]:
    """Return the first place at which ``wrong`` is true, and what stands there."""
    index = [int(i) for i in np.argwhere(wrong)[0]]
    return index, images[tuple(index)]


def _too_many(settings: ServeSettings, given: str) -> Problem:
    text = f"images: a request may hold 1 to {settings.max_images} images, got {given}; send several requests"
    return Problem(422, text)
