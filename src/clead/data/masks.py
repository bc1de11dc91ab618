"""Images with masks: pairs of files are checked, masks become class numbers of one size, and what is all void is left out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clead.data.base import RawSplit, RawSplits
from clead.data.classes import class_counts
from clead.data.mask_layouts import MaskedImages, MaskedSplits
from clead.errors import UserError, first_line, first_of
from clead.losses.pixels import VOID

_FORMATS = ("PNG", "BMP", "GIF", "TIFF", "PPM")  # without loss
_SIDEWAYS = (5, 6, 7, 8)  # values of EXIF's orientation in which height and width change places
_ORIENTATION = 0x0112
_BIT_DEPTH = 24  # where the header of a PNG file has the bits of a pixel
_BITS_PER_SAMPLE = 258  # the tag of a TIFF file that has them
_SHOWN = 8  # numbers that a note names


def to_raw_splits(given: MaskedSplits, names: Sequence[str] | None, size: tuple[int, int] | None) -> RawSplits:
    """Return images and masks as a data set reads them: encoded images, and masks (N, H, W) uint8 in [0, K), ``VOID`` elsewhere.

    Args:
        given: what a layout found.
        names: the K class names, if the layout has none; None: the numbers that masks have.
        size: (H, W) that masks are enlarged or shrunk to, by the nearest pixel; None: they stay.

    Raises:
        UserError: a mask has another size than its image, is no picture of class numbers, or has a number beyond K; all are void.
    """
    masks = {role: decode_masks(each, given.numbers, size) for role, each in given.parts.items() if each.images}
    classes, notes = _class_names(given, names, masks)
    parts = {}
    for role, labels in masks.items():
        files = given.parts[role]
        where = "--data.classes NAMES" if given.classes is None else "where the data names them"
        _check_numbers(labels, classes, files.mask_names, where)
        seen = (labels != VOID).flatten(1).any(1)
        void = [files.mask_names[i] for i in (~seen).nonzero()[:, 0].tolist()]
        if len(void) == len(labels):
            notes.append(f"all {len(void)} masks of the {role} split are void, so it is not read")
            continue
        if void:
            notes.append(
                f"{len(void)} images of the {role} split are left out, because their masks are all void: {first_of(void)}"
            )
        parts[role] = RawSplit(list(files.images), labels, files.names).subset(seen.nonzero()[:, 0])
    if not parts:
        raise UserError(
            f"{next(iter(given.parts.values())).mask_names[0]}: masks must have a pixel with a class, got masks that are void "
            f"({VOID}) alone; write class numbers from 0 on into them"
        )
    return RawSplits(
        **parts, classes=classes, skipped=tuple(given.skipped), notes=tuple(notes), ordered=True, unsplit=given.unsplit
    )


def decode_masks(files: MaskedImages, numbers: Mapping[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Return the masks of one split, (N, H, W) uint8; arguments and errors as of ``to_raw_splits``."""
    table = None
    if numbers is not None:
        table = np.full(256, VOID, np.uint8)
        table[list(numbers)] = list(numbers.values())

    def one(row: int) -> np.ndarray:
        mask = _class_numbers(files.masks[row], files.mask_names[row])
        high, wide = mask.size[::-1]
        if (expected := _image_size(files.images[row])) not in (None, (high, wide)):
            assert expected is not None
            raise UserError(
                f"{files.mask_names[row]}: the mask is {wide}x{high} pixels, its image {files.names[row]} is "
                f"{expected[1]}x{expected[0]}; make both of one size"
            )
        if size is not None and (high, wide) != size:
            mask = mask.resize(size[::-1], Image.Resampling.NEAREST)
        values = np.asarray(mask)
        return values if table is None else table[values]

    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(one, range(len(files.masks))))
    if odd := next((row for row, array in enumerate(arrays) if array.shape != arrays[0].shape), 0):
        (high, wide), (height, width) = arrays[odd].shape, arrays[0].shape
        raise UserError(
            f"{files.names[odd]}: the image is {wide}x{high} pixels, {files.names[0]} is {width}x{height}; resize all alike: "
            f"--data.image_size [{min(height, high)},{min(width, wide)}]"
        )
    return torch.from_numpy(np.stack(arrays))


def _class_numbers(blob: bytes, name: str) -> Image.Image:
    """Return a mask as an image of class numbers, mode L: palette indices or grey values."""
    try:
        mask = Image.open(io.BytesIO(blob), formats=(*_FORMATS, "JPEG"))
        mask.load()
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        raise UserError(
            f"{name}: not a readable mask ({first_line(error)}); write it as a grey or palette PNG"
        ) from None
    if mask.format == "JPEG":
        raise UserError(
            f"{name}: JPEG changes the numbers of a mask; write it as PNG: PIL.Image.fromarray(mask).save('NAME.png')"
        )
    if mask.mode == "1":
        return mask.convert("L").point(lambda value: value // VOID)
    if mask.mode == "I" or mask.mode.startswith("I;16"):
        values = np.asarray(mask)
        if values.min(initial=0) < 0 or values.max(initial=0) > VOID:
            raise UserError(
                f"{name}: class numbers of masks must be in [0, {VOID}], got {values.min()} to {values.max()}; number the "
                f"classes from 0 on, and write {VOID} for void"
            )
        return Image.fromarray(values.astype(np.uint8))
    if mask.mode not in ("L", "P"):
        raise UserError(
            f"{name}: a mask must hold class numbers, as a grey or palette PNG, got colours ({mask.mode}); write the numbers: "
            "PIL.Image.fromarray(numbers.astype('uint8')).save('NAME.png')"
        )
    values = np.asarray(mask)  # palette indices as they are
    if mask.mode == "L" and mask.format in ("PNG", "TIFF"):
        bits = blob[_BIT_DEPTH] if mask.format == "PNG" else mask.getexif().get(_BITS_PER_SAMPLE, 8)
        values = values // (255 // (2**bits - 1))  # Pillow spreads grey of 2 and 4 bits over 0 … 255
    return Image.fromarray(values)


def _image_size(blob: bytes) -> tuple[int, int] | None:
    """Return height and width of an image as its header says; None if it cannot be read, which decoding says better."""
    try:
        with Image.open(io.BytesIO(blob)) as image:
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
            return image.size if sideways else image.size[::-1]
    except Exception:
        return None


def _class_names(
    given: MaskedSplits, names: Sequence[str] | None, masks: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the classes, and notes; without names they are numbers. UserError if there is one class alone."""
    if classes := tuple(given.classes or names or ()):
        return classes, []
    pixels = class_counts(masks.values(), VOID)
    present = [k for k, count in enumerate(pixels) if count]
    count = 1 + max(present, default=-1)
    if count == 1:
        raise UserError(
            f"{next(iter(given.parts.values())).mask_names[0]}: masks must have 2 classes or more, got 0 and {VOID}, which is "
            f"void; if {VOID} is a class, write 1 for it: PIL.Image.fromarray((mask > 0).astype('uint8')).save('NAME.png')"
        )
    notes = []
    if unseen := count - len(present):
        notes.append(
            f"the masks have the numbers {', '.join(map(str, present[:_SHOWN]))}{', …' * (len(present) > _SHOWN)}, so there are "
            f"{count} classes, {unseen} of them without a pixel; if these are no class numbers, number the classes from 0 on"
        )
    return tuple(map(str, range(count))), notes


def _check_numbers(labels: Tensor, classes: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise UserError if a mask has a number that is no class, naming it and the number; ``where`` classes are named."""
    wrong = (labels >= len(classes)) & (labels != VOID)
    if wrong.any():
        row = int(wrong.flatten(1).any(1).nonzero()[0, 0])
        raise UserError(
            f"{names[row]}: masks must be in [0, {len(classes)}), one number per class ({first_of(list(classes))}), or {VOID} for "
            f"void, got {int(labels[row][wrong[row]][0])}; name more classes ({where}), or write {VOID}"
        )


def nearest(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (N, H, W) uint8 at another size (H', W'), by the nearest pixel.

    >>> nearest(torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8), (2, 4)).tolist()
    [[[1, 1, 2, 2], [3, 3, 4, 4]]]
    """
    return functional.interpolate(masks[:, None], size=size, mode="nearest-exact")[:, 0]


def mask_problems(data: Any) -> list[str]:
    """Return which settings of a data set with masks are for one class per image only, one line each."""
    defaults = {
        "cutmix": 0,
        "sampling": "shuffled",
        "extra": None,
        "labelled": 1,
        "label_noise": 0,
        "pseudo_labels_from": None,
        "keep_classes": None,
        "resize": "squash",
    }
    return [
        f"data.{key}: is not for masks, got {getattr(data, key)}; leave it out"
        for key, usual in defaults.items()
        if getattr(data, key) != usual
    ]
