"""Images that are there twice: equal pixels, and nearly equal ones by a perceptual hash; what leaks from one split into another."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clead.data.groups import group_names
from clead.data.label_sampling import label_keys
from clead.errors import needs_extra
from clead.interfaces import ImageSet

HASHED = 5000
"""``load`` looks for near duplicates among so many image files at most: 0.2 ms each."""
_BITS = 8  # of the 64 of a perceptual hash that may differ: JPEG at quality 60 changes 0 to 4
_SMALL_SIDE, _NEAR_SMALL, _NEAR = 32, 0.12, 0.25
_THUMB = 16
_BLOCK = 2048


@dataclass(frozen=True)
class Split:
    """Images of one split: arrays (H, W) or (H, W, 3) uint8, their labels, and their file names or nothing.

    ``digests``, of the pixels in full, may be given where ``images`` are shrunken copies.
    """

    images: Sequence[np.ndarray]
    labels: Sequence[int]
    names: Sequence[str] = ()
    digests: Sequence[bytes] = ()


@dataclass(frozen=True)
class Duplicates:
    """How many images are there twice.

    Args:
        shared: (split, earlier split) -> images of ``split`` whose pixels are those of an image of the earlier one.
        near_shared: likewise of nearly equal images, without the equal ones; empty if they were not looked for.
        within: split -> images that are equal to an earlier one of the same split.
        conflicting: images that are equal to one with another label.
        distinct: different images among all.
        total: all images.
        group_by: a regular expression on file names that keeps nearly equal images together, or None.
        remaining: nearly equal pairs that ``group_by`` leaves in two groups, of ``pairs``.
        pairs: nearly equal pairs of images.
    """

    shared: Mapping[tuple[str, str], int]
    near_shared: Mapping[tuple[str, str], int]
    within: Mapping[str, int]
    conflicting: int
    distinct: int
    total: int
    group_by: str | None = None
    remaining: int = 0
    pairs: int = 0

    def notes(self) -> list[str]:
        """Return what a user must know, one sentence each."""
        notes = self.leaks()
        if self.conflicting:
            notes.append(f"{self.conflicting} images equal an image that has another label")
        if 2 * self.distinct <= self.total and self.total > 2:
            notes.append(f"most images are equal: there are {self.distinct} different ones among {self.total}")
        return notes

    def leaks(self) -> list[str]:
        """Return what makes figures too good: images of one split in another."""
        notes = []
        for (split, earlier), count in self.shared.items():
            if count:
                notes.append(
                    f"{count} {split} images are {earlier} images too (equal pixels): their figures are too good"
                )
        for (split, earlier), count in self.near_shared.items():
            if count:
                notes.append(f"{count} more {split} images nearly equal {earlier} images: their figures are too good")
        if any(self.near_shared.values()) and self.group_by:
            remainder = f"; it leaves {self.remaining} of {self.pairs} pairs apart" if self.remaining else ""
            notes.append(
                f"nearly equal images come in series by their names: --data.group_by '{self.group_by}' keeps each series in one "
                f"split{remainder}"
            )
        return notes


def find_duplicates(splits: Mapping[str, Split], *, near: bool = True) -> Duplicates:
    """Compare every split with those before it: training first.

    Args:
        splits: name -> images; without an empty one.
        near: look for nearly equal images too; raises MissingExtra without imagehash.
    """
    digests = {name: list(split.digests) or [digest(image) for image in split.images] for name, split in splits.items()}
    shared: dict[tuple[str, str], int] = {}
    labels: dict[bytes, set[int]] = {}
    for name, split in splits.items():
        for key, label in zip(digests[name], split.labels, strict=True):
            labels.setdefault(key, set()).add(int(label))
    names = list(splits)
    for i, earlier in enumerate(names):
        known = set(digests[earlier])
        for name in names[i + 1 :]:
            shared[name, earlier] = sum(key in known for key in digests[name])
    everything = [key for name in names for key in digests[name]]
    near_shared, group_by, remaining, pairs = _near(splits, digests) if near else ({}, None, 0, 0)
    return Duplicates(
        shared,
        near_shared,
        {name: len(digests[name]) - len(set(digests[name])) for name in names},
        sum(len(labels[key]) > 1 for key in everything),
        len(labels),
        len(everything),
        group_by,
        remaining,
        pairs,
    )


def digest(image: np.ndarray) -> bytes:
    """Return a digest of an image's shape and pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=str(image.shape).encode()).digest()


def digests_of(images: Tensor) -> list[bytes]:
    """Return a digest of each of the images, (N, C, H, W) uint8."""
    return [digest(image) for image in images.contiguous().numpy()]


def repeats(sets: Sequence[ImageSet], digests: Sequence[bytes]) -> list[str]:
    """Say with counts if many images are of one colour, equal to others, or equal to one with another label; one sentence each.

    It is said where it concerns more than a tenth of all images, and contradicting labels where more than a hundredth.

    Args:
        sets: of one data set; images (N, C, H, W) uint8 in memory.
        digests: of all their images.
    """
    total, counts = len(digests), Counter(digests)
    if not total:
        return []
    labels: dict[bytes, set[int]] = {}
    for key, label in zip(digests, [label for images in sets for label in label_keys(images.labels)], strict=True):
        labels.setdefault(key, set()).add(label)
    pixels = [images.images.flatten(2) for images in sets if len(images)]
    flat = sum(int((each.amax(2) == each.amin(2)).all(1).sum()) for each in pixels)
    notes = []
    most = max(counts.values())
    contradicting = sum(count for digest, count in counts.items() if len(labels[digest]) > 1)
    if 10 * flat > total and pixels[0].shape[2] > 1:
        notes.append(
            f"{flat} of {total} images have one colour all over; look whether the picture lies where it is not read, in an alpha "
            "channel (data.background) or in the low bits"
        )
    if most > 1 and 10 * most > total:
        notes.append(f"{most} of {total} images are one and the same picture, pixel by pixel")
    elif 2 * len(counts) < total:
        notes.append(f"most images are repeated: of {total} only {len(counts)} differ, pixel by pixel")
    if 100 * contradicting > total:
        notes.append(
            f"{contradicting} of {total} images are equal, pixel by pixel, to one with another label: no model can have all right"
        )
    return notes


def _near(
    splits: Mapping[str, Split], digests: Mapping[str, Sequence[bytes]]
) -> tuple[dict[tuple[str, str], int], str | None, int, int]:
    """Return near duplicates between splits, and the expression that keeps them together."""
    names = list(splits)
    signs = signatures([image for split in splits.values() for image in split.images])
    owner = np.repeat(np.arange(len(names)), [len(split.images) for split in splits.values()])
    everything = [key for name in names for key in digests[name]]
    a, b = near_pairs(*signs)  # a < b, so the split of a is not after that of b
    counts: dict[tuple[str, str], int] = {}
    for i, earlier in enumerate(names):
        known = set(digests[earlier])
        for j in range(i + 1, len(names)):
            later = np.unique(b[(owner[a] == i) & (owner[b] == j)])
            counts[names[j], earlier] = sum(everything[k] not in known for k in later)
    files = [name for split in splits.values() for name in split.names]
    if len(files) != len(owner) or not any(counts.values()):
        return counts, None, 0, len(a)
    group_by, remaining = propose(files, list(zip(a.tolist(), b.tolist(), strict=True)))
    return counts, group_by, remaining, len(a)


def signatures(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return perceptual hashes, (N, 64) of ±1; 16×16 thumbnails of mean 0 and deviation 1, (N, 256); and the shorter sides, (N,).

    The hash is pHash (DCT of a 32×32 grey copy). Raises MissingExtra without imagehash.
    """
    with needs_extra("data", "looking for nearly equal images"):
        import imagehash
    hashes = np.empty((len(images), 64), np.float32)
    for k, array in enumerate(images):
        hashes[k] = imagehash.phash(_grey(array)).hash.ravel()
    return 2 * hashes - 1, _thumbnails(images), np.array([min(image.shape[:2]) for image in images])


def _grey(array: np.ndarray) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array)).convert("L")


def _thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return 16×16 grey thumbnails of mean 0 and deviation 1, (N, 256)."""
    thumbs = np.empty((len(images), _THUMB**2), np.float32)
    for k, array in enumerate(images):
        image = _grey(array)
        filter_ = Image.Resampling.BOX if min(image.size) >= _THUMB else Image.Resampling.BILINEAR
        thumbs[k] = np.asarray(image.resize((_THUMB, _THUMB), filter_), np.float32).ravel()
    thumbs -= thumbs.mean(1, keepdims=True)
    thumbs /= np.maximum(np.sqrt((thumbs**2).mean(1, keepdims=True)), 1e-3)
    return thumbs


def equal_or_near(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Say which images are among the references pixel by pixel, and which are not, but nearly, two (N,) bool.

    Nearly equal: the root mean square difference of the thumbnails, whose deviation is 1, is below 0.12. Without a hash, which has
    to agree elsewhere too, this is the stricter of the two limits of ``near_pairs``; 50,000 against 15,000 images take seconds.

    Args:
        images: (N, C, H, W) uint8.
        references: (M, C, H, W) uint8.
    """
    known = set(digests_of(references))
    equal = np.array([key in known for key in digests_of(images)], dtype=bool)
    thumbs, held = (_thumbnails(list(each.permute(0, 2, 3, 1).numpy())) for each in (images, references))
    nearest = np.full(len(thumbs), -1.0, np.float32)
    for start in range(0, len(thumbs), _BLOCK):
        rows = slice(start, start + _BLOCK)
        for other in range(0, len(held), 4 * _BLOCK):
            cosines = thumbs[rows] @ held[other : other + 4 * _BLOCK].T / _THUMB**2
            nearest[rows] = np.maximum(nearest[rows], cosines.max(1))
    # |a − b|²/n = 2 − 2 a·b/n of two thumbnails of deviation 1; images of one colour have 0 and are near nothing.
    near = (nearest > 1 - _NEAR_SMALL**2 / 2) & ~equal
    return torch.from_numpy(equal), torch.from_numpy(near)


def near_pairs(hashes: np.ndarray, thumbs: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs i < j of nearly equal images, two arrays of int64; see ``signatures``.

    At most 8 of 64 bits of the hash differ, and so little of the pixels: the root mean square difference of the thumbnails, whose
    deviation is 1, is below 0.25; below 0.12 if a side is under 32 pixels, where different digits or letters have equal hashes.
    Images of one colour only are nobody's near duplicates: they have no pattern to compare.
    """
    first, second = [], []
    flat = (thumbs**2).mean(1) < 0.5
    limit = np.where(sides < _SMALL_SIDE, _NEAR_SMALL, _NEAR)
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        for other in range(start, len(hashes), _BLOCK):
            i, j = np.nonzero(block @ hashes[other : other + _BLOCK].T >= 64 - 2 * _BITS)
            i, j = i + start, j + other
            i, j = i[i < j], j[i < j]
            for piece in range(0, len(i), 8 * _BLOCK):
                a, b = i[piece : piece + 8 * _BLOCK], j[piece : piece + 8 * _BLOCK]
                distance = np.sqrt(((thumbs[a] - thumbs[b]) ** 2).mean(1))
                close = (distance < np.minimum(limit[a], limit[b])) & ~flat[a] & ~flat[b]
                first.append(a[close])
                second.append(b[close])
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *first]), np.concatenate([empty, *second])


_SERIES = (
    r"^(.*?)[_. -]*(?:frame|image|img|frm|crop|f|t)?[_. -]*[0-9]+(?:[_. -]?(?:left|right|copy|aug[0-9]*))?\.[A-Za-z0-9]+$",
    r"^(.+?)[_. -][^_. -]+\.[A-Za-z0-9]+$",
    r"^([A-Za-z]*[_-]?[0-9]+)[^0-9]",
    r"^([^_. -]+)[_. -]",
    r"([^/]+)/[^/]+$",
)
"""What names of a series have in common, the finest first: all before the last number, before the last part, the first number, the
first part; the folder."""


def propose(names: Sequence[str], pairs: Iterable[tuple[int, int]]) -> tuple[str | None, int]:
    """Return the expression of ``data.group_by`` that keeps nearly equal images together, and how many pairs it leaves apart.

    None if there is no such: nine of ten pairs must be in one group, and there must be four groups or more, none of which holds
    half of the images.

    >>> names = [f"scene{s}_frame{f}.png" for s in range(4) for f in range(3)]
    >>> group_by, apart = propose(names, [(0, 1), (4, 5), (9, 11)])
    >>> group_names(group_by, names, {})[0][::3], apart
    (['scene0', 'scene1', 'scene2', 'scene3'], 0)
    """
    pairs = list(pairs)
    for expression in _SERIES:
        if not any(re.search(expression, name if "/" in expression else PurePath(name).name) for name in names):
            continue
        groups, _ = group_names(expression, names, {})
        _, number, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
        apart = sum(int(number[i] != number[j]) for i, j in pairs)
        if 10 * apart <= len(pairs) and len(sizes) >= 4 and 2 * sizes.max() < len(names):
            return expression, apart
    return None, len(pairs)
