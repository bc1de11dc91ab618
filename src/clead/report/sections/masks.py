"""Masks under attack: IoU of each class, and pictures of the worst images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from clead.losses.pixels import VOID
from clead.report.run import RunResult
from clead.results.format import percent
from clead.results.section import Details, Note, Picture, Row, Section, Table

_BYTES = 2_500_000  # that the pictures of all runs may take together, encoded
_SIDE, _GAP = 128, 4


def masks(runs: Sequence[RunResult]) -> list[Section]:
    """Return the section of the runs that were evaluated on masks, if there are any."""
    shown = [run for run in runs if run.record.masks is not None]
    if not shown:
        return []
    pictures = [block for run in shown for block in _pictures(run, _BYTES // len(shown))]
    intro = (
        "Attacks take pixels, so an image is never broken as a whole; every attack meets every image. Each row of pictures "
        "has the image, its mask, the answer to it, the image under attack and the answer to that; the image with the fewest right "
        "pixels comes first. Black is void: nobody says what it is, and it does not count."
    )
    return [Section("masks", "Masks under attack", 1, intro, [*pictures, _classes(shown)])]


def _classes(runs: Sequence[RunResult]) -> Details:
    """Return a table of each run's IoU per class; the worst case is that of the images chosen for a low mIoU."""
    tables = []
    for run in runs:
        assert run.record.masks is not None
        rows = [
            [
                each.name,
                *("–" if value is None else percent(value) for value in (each.clean, each.robust)),
                f"{each.pixels:,}",
            ]
            for each in run.record.masks.classes
        ]
        columns = ["Class", "clean IoU", "worst case", "pixels"]
        caption = f"{run.name}: intersection over union of each class over all images; worst case: that of the mIoU"
        tables.append(Table(columns, rows, caption, f"IoU per class of {run.name}, table", strong=["worst case"]))
    return Details("IoU of each class", tables)


def _pictures(run: RunResult, budget: int) -> list[Row | Note]:
    """Return the legend of the classes and a row of pictures for each stored image, as many as the budget allows."""
    arrays = run.arrays("index", "x", "labels", "predicted", "x_adv", "predicted_adv")
    if arrays is None:
        return []
    names, rows = run.record.data.classes, []
    for number, x, mask, answer, x_adv, answer_adv in zip(*arrays, strict=True):
        counted = mask != VOID
        shares = [float((each == mask)[counted].mean()) if counted.any() else 1.0 for each in (answer, answer_adv)]
        parts = [_pixels(x), colours(mask), _outlined(answer, counted), _pixels(x_adv), _outlined(answer_adv, counted)]
        png = _png(np.concatenate([strip for each in parts for strip in (_enlarged(each), _gap(each))][:-1], 1))
        budget -= len(png)
        if budget < 0:
            break
        what = f"image {int(number) + 1}: {percent(shares[0])} of the pixels right when clean, {percent(shares[1])} under attack"
        rows.append(
            Picture(
                png, f"{run.name}, {what}: image, mask, answer, image under attack, answer to that", what, wide=True
            )
        )
    legend = Picture(
        _png(_legend(names)), f"Colours of the classes: {', '.join(names)}", f"{run.name}: the classes", wide=True
    )
    left_out = [Note(f"{len(arrays[0]) - len(rows)} more pictures are left out for their size.")]
    return [
        Row(pictures=[legend]),
        *(Row(pictures=[each]) for each in rows),
        *(left_out if len(rows) < len(arrays[0]) else []),
    ]


def palette() -> np.ndarray:
    """Return a colour for each class, (256, 3) uint8, far apart for neighbours; class 0, often the background, is grey, void black.

    >>> palette()[VOID].tolist()
    [0, 0, 0]
    """
    hue = np.arange(256) * 0.618034 % 1 * 6
    level = np.choose(np.arange(256) // 3 % 3, [0.95, 0.7, 0.45])[:, None]
    rainbow = np.clip(np.abs((hue[:, None] + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    result = (255 * level * (0.25 + 0.75 * rainbow)).round().astype(np.uint8)
    result[0], result[VOID] = (203, 213, 225), 0
    return result


def colours(mask: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) as a picture, (H, W, 3) uint8."""
    return palette()[mask]


def _outlined(answer: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return an answer as a picture, void where the mask is."""
    return colours(np.where(counted, answer, VOID))


def _pixels(image: np.ndarray) -> np.ndarray:
    """Return (C, H, W) in [0, 1] as (H, W, 3) uint8."""
    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels[:, :, :1], 3, 2)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Return the picture at a whole multiple of its size that is about 128 pixels, or every n-th pixel of a larger one."""
    side = max(pixels.shape[:2])
    times, every = max(1, round(_SIDE / side)), max(1, side // (2 * _SIDE))
    return np.kron(pixels[::every, ::every], np.ones((times, times, 1), np.uint8))


def _gap(pixels: np.ndarray) -> np.ndarray:
    return np.full((_enlarged(pixels).shape[0], _GAP, 3), 255, np.uint8)


def _legend(names: Sequence[str]) -> np.ndarray:
    """Return a picture of the classes' colours and names, four in a line."""
    cell, lines = (150, 18), -(-len(names) // 4)
    picture = Image.new("RGB", (4 * cell[0], lines * cell[1]), "white")
    pen = ImageDraw.Draw(picture)
    for k, name in enumerate(names):
        left, top = k % 4 * cell[0], k // 4 * cell[1]
        pen.rectangle([left + 2, top + 3, left + 14, top + 15], fill=tuple(palette()[k].tolist()))
        pen.text((left + 20, top + 3), name[:20].encode("latin-1", "replace").decode("latin-1"), fill="black")
    return np.asarray(picture)


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
