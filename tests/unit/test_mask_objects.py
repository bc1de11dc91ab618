"""IoU by object size, against a slow flood fill."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clead.evaluation.objects import BOUNDS, object_scores

VOID = 255


def components(member: np.ndarray) -> list[set[tuple[int, int]]]:
    """Return the connected components, corners included, by flood fill."""
    left, result = {(int(y), int(x)) for y, x in zip(*np.nonzero(member), strict=True)}, []
    while left:
        grown, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            grown.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        result.append(grown)
    return result


def slow(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    scores = np.zeros((3, 2))
    for label in set(target.ravel().tolist()) - {VOID}:
        true = components(target == label)
        answers = components((predicted == label) & (target != VOID))
        for each in true:
            answer = set().union(*(one for one in answers if one & each))
            answer -= set().union(*(other for other in true if other is not each))
            size = sum(len(each) / target.size >= bound for bound in BOUNDS)
            scores[size] += 1, len(each & answer) / len(each | answer)
    return scores


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.05, 0.6))
def test_scores_are_those_of_a_flood_fill(seed, density):
    g = np.random.default_rng(seed)
    target = (g.random((18, 22)) < density).astype(int)
    predicted = np.where(g.random(target.shape) < 0.8, target, 1 - target)
    target[g.random(target.shape) < 0.05] = VOID
    np.testing.assert_allclose(object_scores(predicted, target), slow(predicted, target))


def test_what_is_attached_to_an_object_counts_against_it_and_what_is_not_does_not():
    target = np.zeros((20, 20), int)
    target[2:4, 2:4] = 1  # 4 of 400 pixels: medium
    predicted = target.copy()
    predicted[2:4, 4:6] = 1  # 4 pixels more, attached
    predicted[15:18, 15:18] = 1  # far away
    assert object_scores(predicted, target)[1] == pytest.approx([1, 0.5])
    assert object_scores(np.zeros_like(target), target)[1] == pytest.approx([1, 0])


def test_void_alone_has_no_objects():
    void = np.full((4, 4), VOID)
    assert not object_scores(np.zeros_like(void), void).any()
