"""The square that visitors draw in: its HTML, with ``canvas.js``, and what it sends."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from clead.errors import UserError
from clead.playground.comparison import Comparison

SCRIPT = Path(__file__).with_name("canvas.js").read_text(encoding="utf-8")
_SIDE = 224
_MAX_CHARACTERS = 200_000


def canvas_html(comparison: Comparison) -> str:
    """Return the drawing area, with paper and ink as the test images have them."""
    channels, height, width = comparison.shape
    edge = float(np.median(comparison.images.images[:256, :, (0, -1), :].numpy()))
    paper, ink = ("#000000", "#ffffff") if channels == 1 and edge < 128 else ("#ffffff", "#000000")
    color = '<label>colour <input type="color" value="#c0392b"></label>' if channels == 3 else ""
    return (
        f'<div class="clead"><div style="position:relative;width:{_SIDE}px;max-width:100%">'
        f'<canvas width="{_SIDE}" height="{_SIDE}" tabindex="0" data-paper="{paper}" data-ink="{ink}" '
        f'data-cells="{max(height, width)}" role="img" aria-label="Drawing area: draw with mouse or finger; or move with the arrow '
        'keys and fill a square with the space bar" style="display:block;width:100%;touch-action:none;cursor:crosshair;'
        'border:1px solid var(--line);border-radius:6px"></canvas><div class="cursor" style="position:absolute;pointer-events:none;'
        'outline:1px dashed #d55e00"></div></div><p><button class="wipe" type="button" style="text-decoration:underline">'
        f"start again</button> {color}</p></div>"
    )


def decode_drawing(data: Any) -> bytes:
    """Return the PNG in a data URI; raises UserError if it is none, or too long."""
    if not isinstance(data, str) or not data.startswith("data:image/png;base64,"):
        raise UserError("the drawing: nothing is drawn yet; draw in the square first")
    if len(data) > _MAX_CHARACTERS:
        raise UserError(f"the drawing: at most {_MAX_CHARACTERS} characters are read, got {len(data)}; start again")
    try:
        return base64.b64decode(data.partition(",")[2], validate=True)
    except binascii.Error:
        raise UserError("the drawing: broken data; start again") from None
