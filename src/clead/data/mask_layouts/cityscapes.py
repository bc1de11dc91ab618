"""Cityscapes (Cordts et al. 2016, arXiv:1604.01685): ``leftImg8bit/SPLIT/CITY`` and ``gtFine/SPLIT/CITY``."""

from __future__ import annotations

from pathlib import Path

from clead.data.bounded import read_file
from clead.data.files import display
from clead.data.mask_layouts import MASK_LAYOUTS, MaskedImages, MaskedSplits, MaskLayout
from clead.errors import UserError

CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""The 19 classes that are evaluated, in order, and their value in ``labelIds``; the others are void."""
_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"


def _recognizes(path: Path) -> bool:
    return (path / "leftImg8bit").is_dir() and (path / "gtFine").is_dir()


def _read(path: Path) -> MaskedSplits:
    parts = {}
    for role in ("train", "val", "test"):
        images = sorted((path / "leftImg8bit" / role).glob(f"*/*{_IMAGE}"))
        masks = sorted((path / "gtFine" / role).glob(f"*/*{_MASK}"))
        keys = [
            {(f.parent.name, f.name.removesuffix(end)) for f in some}
            for some, end in ((images, _IMAGE), (masks, _MASK))
        ]
        if alone := sorted(keys[0] ^ keys[1]):
            city, name = alone[0]
            what, folder, end = ("image", "leftImg8bit", _IMAGE) if alone[0] in keys[1] else ("mask", "gtFine", _MASK)
            raise UserError(
                f"{display(path)}: {name} of {city} has no {what} ({len(alone)} such files); fetch "
                f"{display(path / folder / role / city / (name + end))}"
            )
        if images:
            blobs = ([read_file(file) for file in files] for files in (images, masks))
            parts[role] = MaskedImages(*blobs, list(map(str, images)), list(map(str, masks)))
    if not parts:
        raise UserError(f"{display(path)}: holds no leftImg8bit/train/CITY/*{_IMAGE}; unpack both archives there")
    return MaskedSplits(parts, tuple(CLASSES), {value: k for k, value in enumerate(CLASSES.values())})


MASK_LAYOUTS.register("cityscapes")(
    MaskLayout(f"leftImg8bit/SPLIT/CITY/*{_IMAGE} and gtFine/SPLIT/CITY/*{_MASK} (Cityscapes)", _recognizes, _read)
)
