"""Parquet files with a column of images and one of masks, in Hugging Face's layouts."""

from __future__ import annotations

from pathlib import Path

from clead.data.datasets.parquet import IMAGE, choose_column, class_names, has_parquet, images_in, parquet_files, unread
from clead.data.mask_layouts import MASK_LAYOUTS, MaskedImages, MaskedSplits, MaskLayout
from clead.errors import UserError

MASK = ("mask", "masks", "annotation", "segmentation", "segmentation_mask", "label", "labels")
"""What the column of masks may be called."""


def _read(path: Path) -> MaskedSplits:
    files = parquet_files(path)
    parts, names = {}, []
    for role, shards in files.splits.items():
        images: list[bytes] = []
        masks: list[bytes] = []
        rows: list[str] = []
        for shard in shards:
            of_images, of_masks = (choose_column(shard, wanted)[0] for wanted in (IMAGE, MASK))
            images += images_in(shard, of_images, path, [])[0]
            masks += images_in(shard, of_masks, path, [], "mask")[0]
            rows += [f"{shard} row {row}" for row in range(len(images) - len(rows))]
            names.append(class_names(shard, "classes"))
        parts[role] = MaskedImages(images, masks, rows, [f"{row} (mask)" for row in rows])
    if any(each != names[0] for each in names):
        raise UserError(f"{path}: its files name different classes; rewrite them with one list")
    taken = {shard.resolve() for shards in files.splits.values() for shard in shards}
    classes = None if names[0] is None else tuple(names[0])
    return MaskedSplits(parts, classes, skipped=unread(path, taken), unsplit=files.unsplit)


MASK_LAYOUTS.register("parquet")(
    MaskLayout("train-*.parquet and test-*.parquet with the columns image and mask", has_parquet, _read)
)
