"""Images as PNG in data URIs, for pages and answers."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

from clead.report.sections.masks import palette


def to_array(image: Tensor) -> np.ndarray:
    """Return (C, H, W), uint8 or float in [0, 1], as (H, W) or (H, W, 3) uint8."""
    pixels = (image * 255).round().byte() if image.is_floating_point() else image
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return array[..., 0] if array.shape[2] == 1 else array


def png_uri(image: Tensor) -> str:
    """Return (C, H, W), uint8 or float in [0, 1], as a PNG in a data URI, in its own size."""
    buffer = io.BytesIO()
    Image.fromarray(to_array(image)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mask_uri(mask: np.ndarray) -> str:
    """Return a mask (H, W) uint8 as a palette PNG in a data URI: its values are class numbers, shown in the report's colours."""
    picture, buffer = Image.fromarray(mask), io.BytesIO()
    picture.putpalette(palette().tobytes())
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
