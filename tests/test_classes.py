"""Which number a class has."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clead.data.classes import class_order, number_labels


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (map(str, range(11, -1, -1)), list(map(str, range(12)))),
        (["270", "0", "90", "180"], ["0", "90", "180", "270"]),
        (["-5", "10", "-10", "+3"], ["-10", "-5", "+3", "10"]),
        (["007", "10", "08"], ["007", "08", "10"]),
        (["10", "9", "other"], ["10", "9", "other"]),
        (["b", "a", "b"], ["a", "b"]),
        (["²", "1"], ["1", "²"]),  # what str.isdigit would take for a number
    ],
)
def test_names_that_are_all_integers_sort_as_numbers(names, order):
    assert class_order(names) == order


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        ([0, 1, 2], [0, 1, 2], "0 1 2"),
        ([1, 2, 3, 1], [0, 1, 2, 0], "1 2 3"),
        ([90, 0, 270, 180], [1, 0, 3, 2], "0 90 180 270"),
        ([5, 2_000_000_000], [0, 1], "5 2000000000"),
        ([0, 2_000_000_000], [0, 1], "0 2000000000"),
        ([0, 1, 3], [0, 1, 3], "0 1 2 3"),  # 2 may have images elsewhere
        (["10", "9"], [1, 0], "9 10"),
        (["cat", "ant"], [1, 0], "ant cat"),
        ([True, False], [1, 0], "0 1"),
    ],
)
def test_labels_become_class_numbers(values, labels, names):
    numbered, got, notes = number_labels(values[:1], values[1:])
    assert torch.cat(numbered).tolist() == labels and " ".join(got) == names
    assert bool(notes) == (got != tuple(map(str, range(len(set(values))))) and not isinstance(values[0], str))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(0, 30))
def test_every_label_keeps_its_value_as_name_and_its_order(values, cut):
    numbered, names, _ = number_labels(np.array(values[:cut], np.int64), np.array(values[cut:], np.int64))
    labels = torch.cat(numbered).tolist()
    assert [int(names[k]) for k in labels] == values and len(names) <= 2 * len(values)
    assert all(
        (a < b) == (v < w) for a, v in zip(labels, values, strict=True) for b, w in zip(labels, values, strict=True)
    )


def test_negative_labels_stay_for_the_check():
    (labels,), names, _ = number_labels([-1, 0, 1])
    assert labels.tolist() == [-1, 0, 1] and names == ("0", "1")
