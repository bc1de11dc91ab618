"""Wilson's interval and McNemar's test against their formulas by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clead.errors import UserError
from clead.results.statistics import balanced_estimate, estimate, mcnemar


@given(n=st.integers(1, 400), data=st.data())
def test_estimate_is_wilsons_interval(n, data):
    """Wilson 1927: (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)."""
    right = data.draw(st.integers(0, n))
    result = estimate([True] * right + [False] * (n - right))
    z, p = 1.959963984540054, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert result.accuracy == p and result.n == n
    assert result.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert result.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)
    assert 0 <= result.low <= result.accuracy <= result.high <= 1


def test_estimate_at_the_ends():
    assert estimate([True] * 50).high == 1 and 0.9 < estimate([True] * 50).low < 1
    assert estimate([False] * 50).low == 0 and 0 < estimate([False] * 50).high < 0.1
    assert estimate([True]).n == 1


@given(only_a=st.integers(0, 25), only_b=st.integers(0, 25), both=st.integers(0, 5), neither=st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, both, neither):
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    result = mcnemar(a, b)
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p_value == pytest.approx(min(1, 2 * tail))
    assert mcnemar(b, a).p_value == result.p_value


def test_mcnemar_refuses_different_images():
    with pytest.raises(UserError, match="same images, got 2 and 3"):
        mcnemar([True] * 2, [True] * 3)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=8))
def test_balanced_is_the_mean_of_classes(classes):
    sizes = [n for n, _ in classes]
    right = [round(share * n) for n, share in classes]
    result = balanced_estimate(right, sizes)
    assert result.accuracy == pytest.approx(sum(x / n for x, n in zip(right, sizes, strict=True)) / len(sizes))
    assert 0 <= result.low <= result.accuracy <= result.high <= 1 and result.n == sum(sizes)
    assert result.low < result.high, "a class of few images is never certain"


def test_balanced_of_equal_classes_is_nearly_wilsons():
    plain, mean = estimate([True] * 300 + [False] * 100), balanced_estimate([75] * 4, [100] * 4)
    assert mean.accuracy == plain.accuracy
    assert mean.low == pytest.approx(plain.low, abs=2e-3) and mean.high == pytest.approx(plain.high, abs=2e-3)


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((400, 60, 15), (0.9, 0.5, 0.7)), ((300, 30), (0.4, 0.05)), ((100, 40, 40, 20), (0.97, 0.99, 0.9, 0.95))],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(sizes, shares):
    random, truth = np.random.default_rng(0), sum(shares) / len(shares)
    draws = [balanced_estimate(random.binomial(sizes, shares).tolist(), sizes) for _ in range(1500)]
    covered = sum(each.low <= truth <= each.high for each in draws) / len(draws)
    assert 0.925 < covered < 0.99
