"""Pascal VOC (Everingham et al. 2010): JPEGImages, SegmentationClass, and lists in ImageSets/Segmentation."""

from __future__ import annotations

from pathlib import Path

from clead.data.bounded import read_file
from clead.data.files import display
from clead.data.mask_layouts import MASK_LAYOUTS, MaskedImages, MaskedSplits, MaskLayout
from clead.errors import UserError

CLASSES = (
    *(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
    ),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _folder(path: Path) -> Path | None:
    """Return the folder that holds JPEGImages and SegmentationClass: the path, or VOC20XX in it or in its VOCdevkit."""
    candidates = [path, *sorted(path.glob("VOC20*")), *sorted(path.glob("VOCdevkit/VOC20*"))]
    return next(
        (each for each in candidates if (each / "SegmentationClass").is_dir() and (each / "JPEGImages").is_dir()), None
    )


def _read(path: Path) -> MaskedSplits:
    folder = _folder(path)
    assert folder is not None
    parts = {}
    for role in ("train", "val", "test"):
        listed = folder / "ImageSets" / "Segmentation" / f"{role}.txt"
        stems = read_file(listed).decode("utf-8", "replace").split() if listed.is_file() else []
        files = [
            (folder / "JPEGImages" / f"{stem}.jpg", folder / "SegmentationClass" / f"{stem}.png") for stem in stems
        ]
        if role == "test" and files and not any(mask.is_file() for _, mask in files):
            continue  # their masks are not published
        if missing := [file for pair in files for file in pair if not file.is_file()]:
            raise UserError(
                f"{display(listed)} names {len(missing)} files that are not there, such as {display(missing[0])}; fetch them, or "
                "remove their lines"
            )
        if files:
            images, masks = zip(*files, strict=True)
            blobs = ([read_file(file) for file in some] for some in (images, masks))
            parts[role] = MaskedImages(*blobs, list(map(str, images)), list(map(str, masks)))
    if not parts:
        raise UserError(
            f"{display(folder)}: no image is listed in ImageSets/Segmentation/train.txt or val.txt; fetch the lists too"
        )
    return MaskedSplits(parts, CLASSES)


MASK_LAYOUTS.register("voc")(
    MaskLayout(
        "JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/train.txt (Pascal VOC)",
        lambda path: path.is_dir() and _folder(path) is not None,
        _read,
    )
)
