"""Your own images with masks, whatever their layout, for ``--task segmentation``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from clead.data.base import InMemoryDataset, RawSplits, resolve_path
from clead.data.datasets import DATASETS
from clead.data.files import describe
from clead.data.mask_layouts import MASK_LAYOUTS
from clead.data.masks import mask_problems, to_raw_splits
from clead.errors import UserError
from clead.settings import setting, settings

Side = Annotated[int, Field(ge=1)]


@DATASETS.register("masks")
@settings
class Masks(InMemoryDataset):
    """Images with a mask each: Parquet files with the columns image and mask, folders images/ and masks/, Cityscapes, Pascal VOC.

    A mask is a grey or palette PNG of its image's size, whose values are class numbers from 0 on; 255 is void: a pixel that counts
    for nothing. Files belong together by name. Class names are those of the Parquet files, of classes.txt, one a line, or of
    ``classes``; without names they are numbers.
    """

    path: Path = setting(..., "The folder or file; its content decides how it is read.")
    image_size: Side | tuple[Side, Side] | None = setting(  # ty: ignore[incompatible-attribute-override]
        None,
        "Resize images (bilinearly) and masks (by the nearest pixel) to a square of this side, or to [height, width]; by default "
        "they must all have one size.",
        unit="pixels",
    )

    def problems(self) -> list[str]:
        """Return which settings do not go together, or not with masks, one line each."""
        return mask_problems(self) or InMemoryDataset.problems(self)

    def read(self) -> RawSplits:
        """Return encoded images and decoded masks; raises UserError for another layout, or masks that do not fit their images."""
        path = resolve_path(self.path)
        layouts = [each for _, each in MASK_LAYOUTS.items() if each.recognizes(path)]
        if not layouts:
            known = "; ".join(each.layout for _, each in MASK_LAYOUTS.items())
            content = describe(path) if path.is_dir() else "a file of another kind"
            raise UserError(
                f"data.path must hold images and masks, got {str(path)!r}, {content}; layouts that are read: {known}"
            )
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        names = None if self.classes is None else [each if isinstance(each, str) else each[0] for each in self.classes]
        return to_raw_splits(layouts[0].read(path), names, size)
