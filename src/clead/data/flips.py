"""Whether a mirrored image is still of its class: measured among the images themselves, without a training."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SAMPLE = 3000
"""Mirrored images are looked at among so many."""
_SIDE, _ORIENTATIONS = 32, 8
_SAME = 0.98  # similarity from which an image counts as another copy, or the next frame, of the same picture
_SURE = 0.001  # p-value
_LOSS = 0.25  # of what is recognised beyond guessing
_BOTH_WAYS = 0.4  # of the images that are more like a mirrored image: half where there are no sides
_FEW = 40
_SIDED = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Flips:
    """Whether training may mirror images left to right.

    Args:
        safe: whether mirrored images look like images of their class.
        reason: why, with its numbers, in one sentence.
        images: how many images were looked at.
        recognised: fraction of images whose nearest other image is of their class.
        mirrored: fraction of mirrored images whose nearest other image is of their class.
    """

    safe: bool
    reason: str
    images: int
    recognised: float
    mirrored: float


def look_at_flips(
    images: Sequence[np.ndarray], labels: Tensor, classes: Sequence[str], groups: Sequence[str] | None = None
) -> Flips:
    """Say whether mirrored images are as often nearest to an image of their class as the images themselves.

    Near means a high cosine of histograms of gradients (8 directions in overlapping windows of 8 pixels, of a grey copy of 32×32
    pixels). An image's own copies, the next frames and the images of its group are not counted as its neighbours. Where neighbours
    do not tell the classes, it is looked at whether images are as near to mirrored images as to images, which they are in a
    collection that does not know left from right. Names of classes count too: with left or right in them, and single letters.

    Args:
        images: N arrays (H, W) or (H, W, 3) uint8 of any sizes, at most about ``SAMPLE``: all N² pairs are compared.
        labels: (N,) int64.
        classes: the K class names.
        groups: the group of each image, or None.
    """
    from scipy.stats import binomtest  # half a second of every start

    named = _sided_names(classes)
    if len(images) < _FEW:
        reason = named or f"{len(images)} images are too few to see whether mirrored ones are still of their class"
        return Flips(False, reason, len(images), math.nan, math.nan)
    plain = torch.stack([_grey_copy(image) for image in images])
    histograms = _histograms(plain)
    similar, crossed = histograms @ histograms.T, _histograms(plain.flip(3)) @ histograms.T
    onto = _falls_onto(similar, crossed, labels, classes)
    same = similar > _SAME
    same.fill_diagonal_(fill_value=True)
    if groups is not None:
        number = torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])
        same |= number[:, None] == number
    near, near_mirrored = (each.masked_fill(same, -1).max(1) for each in (similar, crossed))
    right, right_mirrored = (labels[each.indices] == labels for each in (near, near_mirrored))
    recognised, mirrored = right.double().mean().item(), right_mirrored.double().mean().item()
    guess = (torch.bincount(labels).max() / len(labels)).item()
    tells = recognised > guess and binomtest(int(right.sum()), len(labels), guess).pvalue < _SURE
    gone, come = int((right & ~right_mirrored).sum()), int((~right & right_mirrored).sum())
    lost = gone > come and binomtest(come, gone + come).pvalue < _SURE
    shares = f"of {len(labels)} mirrored images {mirrored:.1%} are most like an image of their class, unmirrored {recognised:.1%}"
    if named:
        safe, reason = False, named
    elif tells:
        safe = not onto and not (lost and recognised - mirrored > _LOSS * (recognised - guess))
        reason = "; ".join(filter(None, (shares, onto)))
    elif onto:
        safe, reason = False, onto
    else:
        share = (near_mirrored.values > near.values).double().mean().item()
        pictures = len(labels) if groups is None else len(set(groups))
        safe = share > _BOTH_WAYS or binomtest(round(share * pictures), pictures).pvalue > _SURE
        reason = f"{share:.1%} of {len(labels)} images are nearer to a mirrored image than to an image (half: no sides)"
        if safe and all(name.isdecimal() for name in classes):
            safe, reason = False, f"classes are called by numbers, and neighbours do not tell them apart: {shares}"
    return Flips(safe, reason, len(labels), recognised, mirrored)


def _sided_names(classes: Sequence[str]) -> str:
    """Return why these names of classes forbid mirroring, or nothing."""
    if sided := [name for name in classes if _SIDED.search(re.sub("(?<=[a-z])(?=[A-Z])", " ", name))]:
        return f"{len(sided)} classes are named by a side, such as {sided[0]!r}"
    letters = [name for name in classes if len(name) == 1 and name.isalpha()]
    if 2 * len(letters) > len(classes):
        return f"{len(letters)} of {len(classes)} classes are named by a single letter, such as {letters[0]!r}"
    return ""


def _falls_onto(similar: Tensor, crossed: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Say onto which class most mirrored images of another one fall, where the images themselves do not; or nothing."""
    from scipy.stats import binomtest  # half a second of every start

    similar = similar.clone().fill_diagonal_(-1)
    nearest, nearest_mirrored = labels[similar.argmax(1)], labels[crossed.clone().fill_diagonal_(-1).argmax(1)]
    worst: tuple[float, str] = (0.5, "")
    for k in labels.unique().tolist():
        rows = labels == k
        plain, mirrored = nearest[rows], nearest_mirrored[rows]
        other = int(torch.bincount(mirrored[mirrored != k], minlength=k + 1).argmax())
        share = (mirrored == other).double().mean().item()
        gone, come = int(((plain == k) & (mirrored == other)).sum()), int(((plain == other) & (mirrored == k)).sum())
        if other == k or share <= worst[0] or binomtest(come, max(1, gone + come)).pvalue > _SURE:
            continue
        before = (plain == other).double().mean().item()
        text = f"{share:.1%} of the mirrored images of {classes[k]!r} are most like {classes[other]!r}, unmirrored {before:.1%}"
        worst = (share, text) if gone > come else worst
    return worst[1]


def _grey_copy(image: np.ndarray) -> Tensor:
    small = Image.fromarray(np.ascontiguousarray(image)).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).float()[None]


def _histograms(images: Tensor) -> Tensor:
    """Return histograms of gradients of unit length, (N, 392), of images (N, 1, 32, 32)."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")[:, 0]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    turn = torch.atan2(down, right) * (_ORIENTATIONS / math.tau)
    centre = _ORIENTATIONS / 2
    shares = [
        (1 - ((turn - k + centre).remainder(_ORIENTATIONS) - centre).abs()).clamp(min=0) for k in range(_ORIENTATIONS)
    ]
    cells = F.avg_pool2d(torch.stack(shares, 1) * torch.hypot(down, right)[:, None], kernel_size=8, stride=4)
    return F.normalize(cells.flatten(1))
