"""Intervals and tests of accuracies, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clead.errors import UserError
from clead.results.record import BalancedAccuracy, ClassAccuracy, Estimate, Record

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RATIO, _CHANCE = 1.5, 0.05


def estimate(flags: Sequence[bool]) -> Estimate:
    """Return the fraction of true flags with its Wilson 95 % interval (Wilson 1927).

    >>> print(estimate([True] * 8 + [False] * 2).low.__round__(4))
    0.4902
    """
    from scipy.stats import binomtest  # half a second of every start

    right, n = sum(flags), len(flags)
    interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    # Rounding can leave the interval's end a hair inside the fraction itself at 0 and 1.
    fraction = right / n
    return Estimate(accuracy=fraction, low=min(interval.low, fraction), high=max(interval.high, fraction), n=n)


def balanced_estimate(right: Sequence[int], sizes: Sequence[int]) -> Estimate:
    """Return the mean of the accuracies of K classes, with a 95 % interval.

    The variance of the mean is Σ pₖ(1 − pₖ)/nₖ / K², each pₖ with one image more of either kind, so that a class of few images that
    are all right is not taken for certain. The interval is Wilson's for as many images as have this variance; of equal classes, it
    is nearly that of ``estimate``.

    Args:
        right: images that are right, of each class.
        sizes: images of each class, ≥ 1.

    >>> balanced_estimate([90, 1], [100, 10]).accuracy
    0.5
    """
    k, n = len(sizes), sum(sizes)
    mean = sum(x / size for x, size in zip(right, sizes, strict=True)) / k
    shares = [((x + 1) / (size + 2), size) for x, size in zip(right, sizes, strict=True)]
    variance = sum(p * (1 - p) / size for p, size in shares) / k**2
    centre = sum(p for p, _ in shares) / k
    images = centre * (1 - centre) / variance
    middle, half = mean + _Z**2 / (2 * images), _Z * (mean * (1 - mean) / images + _Z**2 / (4 * images**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + _Z**2 / images) for sign in (-1, 1))
    return Estimate(accuracy=mean, low=max(0.0, min(low, mean)), high=min(1.0, max(high, mean)), n=n)


def balanced(classes: Sequence[ClassAccuracy]) -> BalancedAccuracy | None:
    """Return the accuracies in which every class counts alike; None without accuracies per class."""
    if not classes:
        return None
    sizes = [each.n for each in classes]
    clean, robust = (
        balanced_estimate([round(getattr(each, key) * each.n) for each in classes], sizes)
        for key in ("clean_accuracy", "robust_accuracy")
    )
    return BalancedAccuracy(clean=clean, robust=robust)


def unbalanced(record: Record) -> BalancedAccuracy | None:
    """Return the balanced accuracies of a record, of an earlier version too, if classes differ so much that they must be stated.

    The largest class has more than 1.5 times the images of the smallest, and by more than chance (χ² test, 5 %), as the first
    hundred images of balanced data differ.
    """
    from scipy.stats import chisquare

    sizes = [each.n for each in record.per_class]
    if len(sizes) < 2 or max(sizes) <= _RATIO * min(sizes) or chisquare(sizes).pvalue > _CHANCE:
        return None
    return record.balanced or balanced(record.per_class)


class Paired(NamedTuple):
    """McNemar's exact test: images only a gets right, only b gets right, and the two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """Compare two models on the same images (McNemar 1947, in its exact binomial form).

    >>> mcnemar([True] * 5, [False] * 5)
    Paired(only_a=5, only_b=0, p_value=0.0625)
    """
    from scipy.stats import binomtest

    if len(a) != len(b):
        raise UserError(
            f"paired flags must be of the same images, got {len(a)} and {len(b)}; "
            "evaluate both with the same data and --eval.images"
        )
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    different = only_a + only_b
    return Paired(only_a, only_b, float(binomtest(only_a, different).pvalue) if different else 1.0)
