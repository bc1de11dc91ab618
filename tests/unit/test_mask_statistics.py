"""IoU and worst cases over attacks: against torchmetrics, brute force, and what holds of any choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from clead.results.masks import (
    Counts,
    bootstrap,
    class_iou,
    compare_masks,
    counts_of,
    counts_text,
    lowest_accuracy,
    lowest_mean_iou,
    mean_iou,
    pixel_accuracy,
)

VOID = 255


def slow_counts(predicted: np.ndarray, target: np.ndarray, classes: int) -> Counts:
    """Count (N, H, W) by loops, (N, K)."""
    counts = np.zeros((3, len(target), classes), np.int64)
    for image, y, x in np.ndindex(*target.shape):
        said, true = predicted[image, y, x], target[image, y, x]
        if true != VOID:
            counts[1, image, said] += 1
            counts[2, image, true] += 1
            counts[0, image, true] += said == true
    return Counts(*counts)


def answers(n: int, candidates: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, Counts]:
    """Return answers (C, N, 3, 4) of which about half are right, masks (N, 3, 4), and their counts (N, C, K)."""
    g = np.random.default_rng(seed)
    target = g.integers(classes, size=(n, 3, 4))
    predicted = np.where(g.random((candidates, *target.shape)) < 0.5, target, g.integers(classes, size=target.shape))
    target[g.random(target.shape) < 0.1] = VOID
    each = [slow_counts(said, target, classes) for said in predicted]
    return predicted, target, Counts(*(np.stack(values, 1) for values in zip(*each, strict=True)))


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(2, 6), seed=st.integers(0, 1000))
def test_mean_iou_and_accuracy_are_those_of_torchmetrics(classes, seed):
    predicted, target, counts = answers(3, 1, classes, seed)
    said, true = torch.from_numpy(predicted[0]), torch.from_numpy(target)
    total = counts.chosen(np.zeros(3, np.int64)).total()
    how = {"num_classes": classes, "ignore_index": VOID}
    if (target == VOID).all():
        return
    assert mean_iou(total) == pytest.approx(multiclass_jaccard_index(said, true, **how).item(), abs=1e-6)
    assert pixel_accuracy(total) == pytest.approx(
        multiclass_accuracy(said, true, average="micro", **how).item(), abs=1e-6
    )
    each = multiclass_jaccard_index(said, true, average="none", **how).numpy()
    np.testing.assert_allclose(np.nan_to_num(class_iou(total)), each, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 4), candidates=st.integers(1, 3), classes=st.integers(2, 5), seed=st.integers(0, 1000))
def test_the_greedy_choice_lies_between_the_best_of_all_and_every_single_attack(n, candidates, classes, seed):
    _, _, counts = answers(n, candidates, classes, seed)

    def value(choice) -> float:
        return float(mean_iou(counts.chosen(np.array(choice)).total()))

    choice = lowest_mean_iou(counts)
    lowest = min(map(value, itertools.product(range(candidates), repeat=n)))
    assert lowest - 1e-12 <= value(choice) <= min(value([each] * n) for each in range(candidates)) + 1e-12
    for image, other in itertools.product(range(n), range(candidates)):  # no single change lowers it
        assert value([*choice[:image], other, *choice[image + 1 :]]) >= value(choice) - 1e-12


def test_the_greedy_choice_gives_up_right_pixels_of_large_classes_for_small_ones():
    """Two candidates: one loses 6 of 90 pixels of the large class, the other all 2 of the small one, which halves the mIoU."""
    hit = np.array([[[84, 2], [90, 0]]])
    true = np.array([[[90, 2], [90, 2]]])
    predicted = np.array([[[84, 8], [92, 0]]])
    counts = Counts(hit, predicted, true)
    assert lowest_accuracy(counts).tolist() == [0] and lowest_mean_iou(counts).tolist() == [1]


def test_the_lowest_accuracy_is_chosen_image_by_image():
    _, _, counts = answers(6, 4, 3, 0)
    rows = [min(range(4), key=lambda c: counts.hit[image, c].sum()) for image in range(6)]
    assert lowest_accuracy(counts).tolist() == rows


def test_nothing_counted_is_nothing_wrong():
    zero = np.zeros((1, 3), np.int64)
    counts = Counts(zero, zero, zero)
    assert pixel_accuracy(counts.total()) == 1 and mean_iou(counts.total()) == 1 and np.isnan(class_iou(counts)).all()


def test_intervals_are_those_of_a_bootstrap_over_images():
    _, _, counts = answers(40, 1, 4, 1)
    counts = counts.chosen(np.zeros(40, np.int64))
    result = bootstrap(counts, "mean_iou", seed=3)
    g, values = np.random.default_rng(7), []
    for _ in range(2000):  # a bootstrap of its own draws
        rows = g.integers(40, size=40)
        values.append(mean_iou(Counts(*(each[rows] for each in counts)).total()))
    assert result.value == pytest.approx(mean_iou(counts.total()))
    assert result[1:] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.01)
    assert bootstrap(counts, "mean_iou", seed=3) == result != bootstrap(counts, "mean_iou", seed=4)
    accuracy = bootstrap(counts, "pixel_accuracy")
    assert accuracy.low < accuracy.value < accuracy.high


def test_two_models_are_compared_on_the_same_draws():
    _, _, counts = answers(30, 2, 4, 2)
    a = counts.chosen(np.zeros(30, np.int64))
    worse = Counts(a.hit // 2, a.predicted, a.true)
    difference = compare_masks(a, worse, "mean_iou")
    assert difference.low > 0 and difference.p_value == 1 / 1000
    same = compare_masks(a, a, "pixel_accuracy")
    assert same == (0, 0, 0, 1)
    assert compare_masks(worse, a, "mean_iou").difference == pytest.approx(-difference.difference)


def test_counts_are_read_as_they_were_written():
    _, _, counts = answers(5, 1, 4, 3)
    counts = counts.chosen(np.zeros(5, np.int64))
    again = counts_of(counts_text(counts), 4)
    assert all(np.array_equal(a, b) for a, b in zip(counts, again, strict=True))
    assert counts_text(Counts(*np.zeros((3, 1, 4), np.int64))) == [""] and not counts_of([""], 4).true.any()
    for wrong in ("4 1 1 1", "0 1 1", "x"):
        with pytest.raises(ValueError):
            counts_of([wrong], 4)
