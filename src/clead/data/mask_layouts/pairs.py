"""Two folders, ``images/`` and ``masks/``, whose files belong together by name."""

from __future__ import annotations

from pathlib import Path

from clead.data.base import split_role
from clead.data.bounded import read_file
from clead.data.files import display, files_below, visible_folders
from clead.data.mask_layouts import MASK_LAYOUTS, MaskedImages, MaskedSplits, MaskLayout
from clead.errors import UserError

IMAGES, MASKS = ("images", "image", "imgs", "img"), ("masks", "mask", "labels", "annotations")
"""What the folders may be called."""


def folder_pair(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of masks in ``folder``, if both are there."""
    inside = {each.name.lower(): each for each in visible_folders(folder)}
    images, masks = (next((inside[name] for name in names if name in inside), None) for names in (IMAGES, MASKS))
    return (images, masks) if images and masks else None


def split_pairs(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the two folders of each split: SPLIT/images and SPLIT/masks, or images/SPLIT and masks/SPLIT; "" without splits."""
    if (pair := folder_pair(root)) is None:
        inside = {split_role(each.name): folder_pair(each) for each in visible_folders(root)}
        return {str(role): pair for role, pair in inside.items() if role and pair}
    images, masks = ({split_role(each.name): each for each in visible_folders(folder)} for folder in pair)
    both = {str(role): (images[role], masks[role]) for role in images if role and role in masks}
    return both or {"": pair}


def _recognizes(path: Path) -> bool:
    return path.is_dir() and bool(split_pairs(path))


def _read(path: Path) -> MaskedSplits:
    skipped: list[str] = []
    parts = {role or "train": paired(*pair, skipped) for role, pair in split_pairs(path).items()}
    names = path / "classes.txt"
    classes = None
    if names.is_file():
        classes = tuple(filter(None, map(str.strip, read_file(names).decode("utf-8", "replace").splitlines())))
    return MaskedSplits(parts, classes, skipped=skipped, unsplit="" in split_pairs(path))


def paired(images: Path, masks: Path, skipped: list[str]) -> MaskedImages:
    """Return the files below two folders that have one path but for their endings; UserError for one without the other."""
    of_images, of_masks = (_by_stem(folder, skipped) for folder in (images, masks))
    alone = [(file, masks, "mask") for stem, file in of_images.items() if stem not in of_masks]
    alone += [(file, images, "image") for stem, file in of_masks.items() if stem not in of_images]
    if alone:
        file, folder, what = alone[0]
        other = images if what == "mask" else masks
        expected = folder / file.relative_to(other).with_suffix(".png" if what == "mask" else file.suffix)
        more = f" ({len(alone)} such files)" if len(alone) > 1 else ""
        raise UserError(
            f"{display(file)}: has no {what}{more}; images and masks belong together by name: add {display(expected)}, or move "
            f"the file elsewhere: mv {display(file)} {display(images.parent)}"
        )
    stems = sorted(of_images)
    files, of_mask = ([chosen[stem] for stem in stems] for chosen in (of_images, of_masks))
    return MaskedImages(
        *([read_file(file) for file in each] for each in (files, of_mask)),
        list(map(str, files)),
        list(map(str, of_mask)),
    )


def _by_stem(folder: Path, skipped: list[str]) -> dict[str, Path]:
    """Return the images below a folder by their path without its ending; what is no image is added to ``skipped``."""
    files: dict[str, Path] = {}
    for file, reason in files_below(folder):
        if reason is not None:
            skipped.append(f"{display(file)}: {reason}")
            continue
        stem = str(file.relative_to(folder).with_suffix(""))
        if stem in files:
            raise UserError(
                f"{display(file)}: {display(files[stem].name)} has the same name but for its ending, and only one can belong to "
                f"the mask or image {display(stem)}; remove one: rm {display(file)}"
            )
        files[stem] = file
    return files


MASK_LAYOUTS.register("pairs")(
    MaskLayout("images/*.jpg and masks/*.png of the same names, in SPLIT/ or with SPLIT/ inside", _recognizes, _read)
)
