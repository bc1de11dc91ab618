"""Images and labels as people hold them in Python: tensors, arrays, loaders of tuples or dictionaries, data sets of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clead.errors import UserError
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION

_IMAGES = ("pixel_values", "images", "image", "img", "inputs", "input", "x", "data")
_LABELS = ("labels", "label", "targets", "target", "y", "fine_label", "class")
_CHANNELS = (1, 3, 4)


def images_and_labels(
    images: Any, labels: Any = None, *, limit: int | None = None, task: Task = CLASSIFICATION
) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W), float or uint8, and labels (N,) int64, both apart from any graph.

    Args:
        images: a tensor or an array; or, without ``labels``, batches or single samples of both: pairs, longer tuples whose first
            two entries are image and label, or dictionaries with one entry named like images and one like labels.
        labels: integers of shape (N,) or (N, 1), or a list of them.
        task: whose targets the labels are.
        limit: stop reading batches when there are so many images; the last batch is whole.

    Raises UserError, with the line that mends it, for anything whose meaning is not clear.
    """
    if labels is None:
        images, labels = _collected(images, limit)
    x, y = _as_tensor("images", images).detach(), _as_tensor("labels", labels).detach()
    _check_layout(x)
    return x, task.as_target(y, len(x))


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and name == "labels" and any(isinstance(each, str) for each in value):
        raise UserError(
            f"labels must be class numbers, got text {next(each for each in value if isinstance(each, str))!r}; give "
            "torch.tensor([names.index(name) for name in labels])"
        )
    if isinstance(value, list | tuple) and name == "labels" or isinstance(value, np.ndarray | np.generic):
        try:
            return torch.as_tensor(np.ascontiguousarray(value))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} must be numbers, got an array of {np.asarray(value).dtype}; "
                "give np.asarray(values, dtype=np.float32), or int64 for labels"
            ) from error
    raise UserError(f"{name} must be a torch.Tensor, got a {type(value).__name__}; use torch.as_tensor")


def _check_layout(x: Tensor) -> None:
    shape = tuple(x.shape)
    if x.dim() == 4 and shape[3] in _CHANNELS and min(shape[1:3]) > max(_CHANNELS):
        raise UserError(
            f"images must be (N, C, H, W), got {shape}, which looks like (N, H, W, C); give images.permute(0, 3, 1, 2)"
        )
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise UserError(
            f"images must be float in [0, 1] or uint8, got {x.dtype}; give images.float() / 255 for pixels in [0, 255]"
        )


def _collected(batches: Any, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return images and labels of a loader or a data set, on the CPU."""
    pairs, count = [], 0
    if not isinstance(batches, Tensor | np.ndarray | str | Mapping):
        for batch in _each(batches):
            image, label = _parts(batch)
            x, y = _pixels(image).cpu(), _as_tensor("labels", [label] if _number(label) else label).cpu()
            pairs.append((x[None], y.reshape(1, *y.shape[1:])) if x.dim() == 3 and y.numel() <= 1 else (x, y))
            count += len(pairs[-1][0])
            if limit is not None and count >= limit:
                break
    if not pairs:
        raise UserError(
            f"labels are missing; give evaluate(model, images, labels) or batches of both, got {batches!r:.60}"
        )
    shapes = dict.fromkeys(tuple(x.shape[1:]) for x, _ in pairs)
    if len(shapes) > 1:
        raise UserError(
            f"images must be of one shape, got {', '.join(map(str, list(shapes)[:3]))}; resize them in the data set"
        )
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _each(batches: Any) -> Iterator[Any]:
    if isinstance(batches, Iterable):
        return iter(batches)
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        return (batches[index] for index in range(len(batches)))
    return iter(())


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.generic) and not isinstance(value, np.ndarray)


def _parts(batch: Any) -> tuple[Any, Any]:
    """Return the images and the labels of one batch or sample."""
    if isinstance(batch, Mapping):
        names = [[name for name in known if name in batch] for known in (_IMAGES, _LABELS)]
        if all(len(each) == 1 for each in names):
            return batch[names[0][0]], batch[names[1][0]]
        raise UserError(
            f"batches must be pairs of images and labels, got a dict with the keys {', '.join(map(str, batch))}; "
            "give (batch[IMAGES], batch[LABELS]) for batch in loader, with the right keys"
        )
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise UserError(
            f"batches must be pairs of images and labels, got a {type(batch).__name__}; give (images, labels) for each batch"
        )
    return batch[0], batch[1]


def _pixels(image: Any) -> Tensor:
    """Return a picture as (C, H, W) uint8, anything else as a tensor."""
    if isinstance(image, Image.Image):
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        return torch.tensor(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    return _as_tensor("images", image)
