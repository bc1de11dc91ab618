"""Arrays in one NumPy ``.npz`` file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clead.data.base import Found, InMemoryDataset, Part, default_names, existing
from clead.data.datasets import DATASETS, READERS, Reader
from clead.errors import UserError
from clead.settings import setting, settings

_BOMB_ABOVE, _BOMB_RATIO = 2**28, 100
_KEYS = ("x_train", "y_train", "x_test", "y_test")


@DATASETS.register("npz")
@settings
class Npz(InMemoryDataset):
    """A ``.npz`` file with x_train, y_train, x_test, y_test and optionally classes (names); x_test, y_test to evaluate only.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, uint8 or float in [0, 1].
    """

    path: Path = setting(..., "The .npz file.")

    def read(self) -> Found:
        """Return the arrays; raises UserError if they are not as described."""
        return read_npz(existing(self.path))


def read_npz(path: Path) -> Found:
    """Read the file; pickled content is refused."""
    try:
        _check_unpacked(path)
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in (*_KEYS, "classes")}
            keys = file.files
        if raw := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{raw[0]} is no array")
    except UserError:
        raise
    except Exception as error:  # zipfile, its decoders and NumPy raise whatever a broken file makes them raise
        reason = str(error).splitlines()[0] if str(error) and "pickle" not in str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable .npz file without pickled objects ({reason}); write it with numpy.savez "
            "and plain arrays"
        ) from None
    if "x_test" in arrays and not {"x_train", "y_train"} & set(arrays):  # to be evaluated on, not trained
        arrays |= {f"{key}_train": arrays[f"{key}_test"][:0] for key in ("x", "y") if f"{key}_test" in arrays}
    if missing := [key for key in _KEYS if key not in arrays]:
        raise UserError(f"{path}: must hold {', '.join(_KEYS)}, lacks {', '.join(missing)}; it holds {', '.join(keys)}")
    train, test = (_part(arrays, part, path) for part in ("train", "test"))
    if "classes" in arrays:
        return Found(train, test, tuple(map(str, arrays["classes"].ravel())))
    return Found(train, test, default_names(train.labels, test.labels))


def _check_unpacked(path: Path) -> None:
    """Raise UserError if a small file says that it unpacks to a large one."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())  # no more than this is ever read of a member
    if size > max(_BOMB_ABOVE, _BOMB_RATIO * path.stat().st_size):
        raise UserError(
            f"{path}: {path.stat().st_size} bytes that unpack to {size} are no images (a zip bomb?); images above "
            f"{_BOMB_ABOVE} bytes may shrink to a {_BOMB_RATIO}th at most: write it with numpy.savez"
        )


def _part(arrays: dict[str, np.ndarray], part: str, path: Path) -> Part:
    images, labels = _images(arrays[f"x_{part}"], f"{path}: x_{part}"), arrays[f"y_{part}"]
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: y_{part} must be {len(images)} integers, one per image, got {labels.dtype} "
            f"{labels.shape}; give class numbers, not one-hot rows or names"
        )
    return Part(images, torch.from_numpy(labels.astype(np.int64)))


def _images(array: np.ndarray, name: str) -> Tensor:
    """Return (N, C, H, W) uint8."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and (array.shape[1] in (1, 3)) != (array.shape[3] in (1, 3)):
        array = array.transpose(0, 3, 1, 2) if array.shape[3] in (1, 3) else array
    else:
        raise UserError(
            f"{name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3 and no doubt which axis "
            f"it is, got {array.shape}; transpose it"
        )
    if array.dtype.kind == "f" and array.size:
        low, high = array.min(), array.max()  # NaN if any value is
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{name} of floats must be in [0, 1], got values from {low:g} to {high:g}; divide by the "
                "white value (255?) and mend NaN, or save as uint8"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(
            f"{name} must be uint8 or float in [0, 1], got {array.dtype}; convert with .astype(numpy.uint8)"
        )
    return torch.from_numpy(np.ascontiguousarray(array))


READERS.register("npz")(
    Reader(
        "FILE.npz with x_train, y_train, x_test, y_test",
        lambda path: path.is_file() and path.suffix == ".npz",
        read_npz,
    )
)
