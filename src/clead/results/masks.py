"""Statistics of masks, from counts of pixels per image and class: IoU, worst cases over attacks, intervals over images.

Void pixels are in no count. Of N images with C candidate answers each, one per attack, the counts are (N, C, K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_SWEEPS = 100
RESAMPLES = 1000
"""Draws of a bootstrap interval."""


class Counts(NamedTuple):
    """Pixels of each class: taken for it and of it, taken for it, of it; int64 (…, K)."""

    hit: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def total(self) -> Counts:
        """Return the sums over the first axis."""
        return Counts(*(values.sum(0) for values in self))

    def chosen(self, choice: np.ndarray) -> Counts:
        """Return of (N, C, K) the candidate ``choice`` (N,) of each image, (N, K)."""
        return Counts(*(values[np.arange(len(choice)), choice] for values in self))


def pixel_accuracy(counts: Counts) -> np.ndarray:
    """Return the share of pixels that are right, (…): 1 where there is none.

    >>> float(pixel_accuracy(Counts(np.array([3, 0]), np.array([4, 0]), np.array([3, 1]))))
    0.75
    """
    pixels = counts.true.sum(-1)
    return np.where(pixels > 0, counts.hit.sum(-1) / np.maximum(pixels, 1), 1.0)


def class_iou(counts: Counts) -> np.ndarray:
    """Return hit / (predicted + true − hit) of each class, (…, K); NaN of a class that is neither there nor predicted."""
    union = counts.predicted + counts.true - counts.hit
    return np.where(union > 0, counts.hit / np.maximum(union, 1), np.nan)


def mean_iou(counts: Counts) -> np.ndarray:
    """Return the mean of the IoU over the classes that are there or predicted, (…): the field's mIoU; 1 if there is none.

    >>> float(mean_iou(Counts(np.array([3, 0, 0]), np.array([4, 0, 0]), np.array([3, 1, 0]))))
    0.375
    """
    iou = class_iou(counts)
    classes = (~np.isnan(iou)).sum(-1)
    return np.where(classes > 0, np.nansum(iou, -1) / np.maximum(classes, 1), 1.0)


def lowest_accuracy(counts: Counts) -> np.ndarray:
    """Return of (N, C, K) the candidate of each image with the fewest right pixels, (N,) int64; of equal ones the first."""
    return counts.hit.sum(-1).argmin(1)


def lowest_mean_iou(counts: Counts) -> np.ndarray:
    """Return of (N, C, K) the candidate of each image by which the mIoU of all of them is low, (N,) int64.

    Chosen greedily, as the best choice is out of reach (arXiv:2306.12941): image by image the candidate that lowers the mIoU of the
    data set most, until no single change lowers it. Begun from every candidate alone and from the lowest accuracies; the lowest
    end counts, so the result is never above what one attack reaches.
    """
    n, candidates = counts.hit.shape[:2]
    starts = [np.full(n, each) for each in range(candidates)] + [lowest_accuracy(counts)]
    ends = [_descend(counts, start) for start in starts]
    return min(ends, key=lambda choice: float(mean_iou(counts.chosen(choice).total())))


def _descend(counts: Counts, choice: np.ndarray) -> np.ndarray:
    choice = choice.copy()
    total = counts.chosen(choice).total()
    for _ in range(_SWEEPS):
        changed = False
        for image in range(len(choice)):
            rest = Counts(*(whole - values[image, choice[image]] for whole, values in zip(total, counts, strict=True)))
            tried = Counts(*(values + each[image] for values, each in zip(rest, counts, strict=True)))
            value = mean_iou(tried)
            best = int(value.argmin())
            if value[best] < value[choice[image]]:
                choice[image], changed = best, True
                total = Counts(*(values[best] for values in tried))
        if not changed:
            break
    return choice


class Interval(NamedTuple):
    """A figure of all images, and its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


METRICS: dict[str, Callable[[Counts], np.ndarray]] = {"pixel_accuracy": pixel_accuracy, "mean_iou": mean_iou}


def bootstrap(counts: Counts, metric: str, seed: int = 0) -> Interval:
    """Return a metric of ``METRICS`` of the counts (N, K) with its interval.

    The images are drawn again with replacement ``RESAMPLES`` times, the same for equal N and ``seed``; the interval goes from the
    2.5th to the 97.5th percentile. The choice of attacks is not made anew.
    """
    value = float(METRICS[metric](counts.total()))
    low, high = _percentiles(_resampled(counts, metric, seed))
    return Interval(value, min(low, value), max(high, value))


class MaskDifference(NamedTuple):
    """Difference of two models on the same images: a less b, its 95 % interval, and a two-sided bootstrap p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def compare_masks(a: Counts, b: Counts, metric: str, seed: int = 0) -> MaskDifference:
    """Compare two models by a metric of ``METRICS`` of their counts (N, K) on the same N images, in the same order.

    Both are computed from the same draws of images; p is twice the smaller share of draws on one side of 0, at least 1 / draws.
    """
    draws = _resampled(a, metric, seed) - _resampled(b, metric, seed)
    value = METRICS[metric]
    tail = min(float((draws <= 0).mean()), float((draws >= 0).mean()))
    p_value = min(1.0, max(2 * tail, 1 / RESAMPLES))
    return MaskDifference(float(value(a.total()) - value(b.total())), *_percentiles(draws), p_value)


def _resampled(counts: Counts, metric: str, seed: int) -> np.ndarray:
    """Return the metric of each resample, (R,)."""
    n = len(counts.hit)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return METRICS[metric](Counts(*(times @ values for values in counts)))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def counts_text(counts: Counts) -> list[str]:
    """Return counts (N, K) as a text for each image, as ``clead.results.record.MaskResult`` has them.

    >>> counts_text(Counts(np.array([[3, 0]]), np.array([[4, 0]]), np.array([[3, 0]])))
    ['0 3 4 3']
    """
    values = np.stack(counts, -1)
    return [", ".join(f"{k} {' '.join(map(str, row[k]))}" for k in np.flatnonzero(row.any(-1))) for row in values]


def counts_of(texts: Sequence[str], num_classes: int) -> Counts:
    """Return the counts (N, K) that ``counts_text`` wrote; raises ValueError if they are none of so many classes."""
    values = np.zeros((len(texts), num_classes, 3), np.int64)
    for image, text in enumerate(texts):
        for each in filter(None, text.split(", ")):
            k, *row = map(int, each.split(" "))
            if not 0 <= k < num_classes or len(row) != 3:
                raise ValueError(f"counts must be of a class in [0, {num_classes}), got {each!r}")
            values[image, k] = row
    return Counts(*np.moveaxis(values, -1, 0))
