"""Intervals and tests of accuracies, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import binomtest

from clead.errors import UserError
from clead.results.record import Estimate


def estimate(flags: Sequence[bool]) -> Estimate:
    """Return the fraction of true flags with its Wilson 95 % interval (Wilson 1927).

    >>> print(estimate([True] * 8 + [False] * 2).low.__round__(4))
    0.4902
    """
    right, n = sum(flags), len(flags)
    interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    # Rounding can leave the interval's end a hair inside the fraction itself at 0 and 1.
    fraction = right / n
    return Estimate(accuracy=fraction, low=min(interval.low, fraction), high=max(interval.high, fraction), n=n)


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
    if len(a) != len(b):
        raise UserError(
            f"paired flags must be of the same images, got {len(a)} and {len(b)}; "
            "evaluate both with the same data and --eval.images"
        )
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    different = only_a + only_b
    return Paired(only_a, only_b, float(binomtest(only_a, different).pvalue) if different else 1.0)
