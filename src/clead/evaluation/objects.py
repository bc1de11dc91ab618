"""IoU by size of the objects in a mask: small ones fall first under attack, and an mIoU hides it (arXiv:2407.09150)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from clead.losses.pixels import VOID

SIZES = ("small", "medium", "large")
BOUNDS = (1 / 300, 3 / 100)
"""From where objects are medium, and large, as parts of the image: COCO's 32² and 96² pixels of 640×480."""
_TOUCHING = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner belong together


def object_scores(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return how many objects of each size an image has and the sum of their IoU, (3, 2) float64.

    An object is a connected component of one class of the mask. Its IoU is |object ∩ answer| / |object ∪ answer|, where the answer
    are the components of predicted pixels of its class that overlap it, without pixels of other objects of the class; 0 if none
    does. Void pixels count for nothing.

    Args:
        predicted: (H, W) classes.
        target: (H, W) classes, 255 where void.

    >>> mask = np.zeros((40, 40), int); mask[:2, :2] = 1
    >>> object_scores(mask, mask).tolist()
    [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    """
    scores = np.zeros((len(SIZES), 2))
    for label in np.unique(target[target != VOID]):
        of_class = target == label
        objects, n = ndimage.label(of_class, _TOUCHING)
        answers, m = ndimage.label((predicted == label) & (target != VOID), _TOUCHING)
        areas = np.bincount(objects.ravel(), minlength=n + 1)
        hits = np.bincount(objects[answers > 0], minlength=n + 1)
        beside = np.bincount(answers[~of_class], minlength=m + 1)
        pairs = np.unique(objects[(objects > 0) & (answers > 0)] * (m + 1) + answers[(objects > 0) & (answers > 0)])
        wrong = np.bincount(pairs // (m + 1), weights=beside[pairs % (m + 1)], minlength=n + 1)
        sizes = np.searchsorted(BOUNDS, areas[1:] / target.size, side="right")
        np.add.at(scores[:, 0], sizes, 1)
        np.add.at(scores[:, 1], sizes, hits[1:] / (areas[1:] + wrong[1:]))
    return scores
