"""Images that are equal pixel by pixel: what that means for a figure, in words."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from clead.interfaces import ImageSet


def repeats(sets: Sequence[ImageSet]) -> list[str]:
    """Say with counts if many images are of one colour, equal to others, or equal to one with another label; one sentence each.

    It is said where it concerns more than a tenth of all images, and contradicting labels where more than a hundredth.

    Args:
        sets: of one data set; images (N, C, H, W) uint8 in memory.
    """
    counts: Counter[bytes] = Counter()
    labels: dict[bytes, set[int]] = {}
    flat = 0
    for images in sets:
        if not len(images):
            continue
        pixels = images.images.flatten(2)
        flat += int((pixels.amax(2) == pixels.amin(2)).all(1).sum())
        for image, label in zip(images.images.contiguous().numpy(), images.labels.tolist(), strict=True):
            digest = hashlib.blake2b(image, digest_size=16).digest()
            counts[digest] += 1
            labels.setdefault(digest, set()).add(label)
    total = counts.total()
    if not total:
        return []
    notes = []
    most = max(counts.values())
    contradicting = sum(count for digest, count in counts.items() if len(labels[digest]) > 1)
    if 10 * flat > total and pixels.shape[2] > 1:
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
