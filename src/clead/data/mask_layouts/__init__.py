"""How images and their masks lie on a disk, one layout per file; ``MASK_LAYOUTS`` finds them by what lies at a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clead.registry import Registry


@dataclass(frozen=True)
class MaskedImages:
    """One split as a layout found it: the bytes of image files and of their masks, in one order, and what to call both."""

    images: Sequence[bytes] = ()
    masks: Sequence[bytes] = ()
    names: Sequence[str] = ()
    mask_names: Sequence[str] = ()


@dataclass(frozen=True)
class MaskedSplits:
    """What a layout returns, not yet decoded.

    Attributes:
        parts: train, val and test, as far as they are there.
        classes: names of the classes 0 … K − 1, or None if nothing names them.
        numbers: value of a mask -> class; all other values are void. None: values are classes, and 255 is void.
        skipped: one line for each file that is there and was not read.
        unsplit: whether ``train`` holds all images of data that knows no splits.
    """

    parts: Mapping[str, MaskedImages]
    classes: tuple[str, ...] | None = None
    numbers: Mapping[int, int] | None = None
    skipped: Sequence[str] = field(default_factory=tuple)
    unsplit: bool = False


class MaskLayout(NamedTuple):
    """How one layout is read.

    Attributes:
        layout: the layout in one line, for messages and the docs.
        recognizes: says whether a path has this layout; looks at names only, and never raises.
        read: path -> ``MaskedSplits``; raises UserError if the content is not as the layout says.
    """

    layout: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], MaskedSplits]


MASK_LAYOUTS: Registry[Any] = Registry("layout of masks", "clead.data.mask_layouts")
