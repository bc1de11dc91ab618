"""Adversarial images in a Parquet file, exactly as they were verified, to be looked at and scored again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clead.atomic_io import check_output, write_output
from clead.errors import MissingExtra, UserError
from clead.results.record import Record

_KEY = b"clead"


def check_writable(path: Path) -> None:
    """Raise UserError if ``save`` could not write there: before hours of attacks, not after."""
    _pyarrow()
    if path.suffix != ".parquet":
        raise UserError(f"adversarial images are written as Parquet, got {path}; give a name that ends in .parquet")
    check_output(path)


def save(path: Path, x_adv: Tensor, labels: Tensor, record: Record) -> None:
    """Write one row per evaluated image.

    ``image`` is a PNG as every reader of image data sets shows it; its 8 bits can undo a perturbation, so ``pixels`` holds the
    exact float32 values (little-endian, C·H·W), which are what ``clead attack --verify`` scores. ``label`` and ``robust`` as in
    the record; ``attack`` names what broke the image, or is empty: then the pixels are of the last attempt.

    Args:
        path: the Parquet file.
        x_adv: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64.
        record: the evaluation that made them.
    """
    pa, pq = _pyarrow()
    broke = [""] * len(labels)
    for attack in reversed(record.attacks):
        broke = [attack.name if not right else name for name, right in zip(broke, attack.flags, strict=True)]
    broke = [
        name if clean and not robust else ""
        for name, clean, robust in zip(broke, record.clean_flags, record.robust_flags, strict=True)
    ]
    columns = {
        "image": [{"bytes": _png(image), "path": None} for image in x_adv],
        "label": labels.tolist(),
        "pixels": [image.contiguous().numpy().astype("<f4").tobytes() for image in x_adv],
        "clean": record.clean_flags,
        "robust": record.robust_flags,
        "attack": broke,
    }
    table = pa.table(columns)
    about = {
        "shape": list(x_adv.shape[1:]),
        "threat": record.threat.model_dump(),
        "suite": record.suite,
        "run": record.run,
        "model": record.model.fingerprint,
        "images": record.data.images,
        "classes": record.data.classes,
    }
    features = {"label": {"names": record.data.classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {_KEY: json.dumps(about).encode(), b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    write_output(path, buffer.getvalue())


def load(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return (x_adv (N, C, H, W) float32, 8-bit images (N, C, H, W) uint8, what the file says of itself).

    The last also has ``labels``, (N,) int64, and ``robust``, (N,) bool. Raises UserError if the file was not made by ``save``.
    """
    _, pq = _pyarrow()
    if not path.is_file():
        raise UserError(f"no file of adversarial images at {path}; run: clead evaluate RUN --save-adversarial")
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_KEY])
        shape = tuple(about["shape"])
        pixels = np.stack([np.frombuffer(row, "<f4").reshape(shape) for row in table["pixels"].to_pylist()])
        images = np.stack([_pixels(row["bytes"], shape) for row in table["image"].to_pylist()])
        about["labels"] = torch.tensor(table["label"].to_pylist())
        about["robust"] = torch.tensor(table["robust"].to_pylist())
    except Exception as error:  # Arrow, Pillow and NumPy raise whatever a broken file makes them raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} is not a file of clead evaluate --save-adversarial ({reason}); run that again"
        ) from None
    return torch.from_numpy(pixels), torch.from_numpy(images), about


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", "adversarial images in Parquet") from None
    return pyarrow, pyarrow.parquet


def _png(image: Tensor) -> bytes:
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    if array.shape[2] in (1, 3):
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    else:  # no picture has so many channels: the first one is shown
        Image.fromarray(np.ascontiguousarray(array[:, :, 0])).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(png: bytes, shape: tuple[int, ...]) -> np.ndarray:
    image = Image.open(io.BytesIO(png), formats=("PNG",))
    if image.size != (shape[2], shape[1]):  # before it is decoded: a few bytes can hold gigabytes
        raise ValueError(f"an image is {image.width}x{image.height} pixels, should be {shape[2]}x{shape[1]}")
    array = np.asarray(image)
    array = array[:, :, None] if array.ndim == 2 else array
    return np.ascontiguousarray(np.broadcast_to(array.transpose(2, 0, 1), shape))
