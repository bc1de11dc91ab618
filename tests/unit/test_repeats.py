"""Data sets of equal images are said with counts."""

import numpy as np
import pytest
import torch

from clead.data import duplicates
from clead.data.duplicates import digests_of
from clead.interfaces import ImageSet


def repeats(sets):
    return duplicates.repeats(sets, [digest for part in sets for digest in digests_of(part.images)])


def images(values, labels):
    rng = np.random.RandomState(0)
    kinds = rng.randint(0, 256, (1 + max(values), 3, 4, 4), dtype=np.uint8)
    return ImageSet(torch.from_numpy(kinds[values]), torch.tensor(labels))


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        (range(20), [0, 1] * 10, []),
        ([*range(17), 0, 0, 0], [0] * 20, ["4 of 20 images are one and the same picture"]),
        (
            [*range(18), 0, 0],
            [0] * 19 + [1],
            ["3 of 20 images are one and", "3 of 20 images are equal", "another label"],
        ),
        ([k for k in range(15) for _ in range(3)], [0] * 45, ["of 45 only 15 differ"]),
        ([0] * 6, [0, 1] * 3, ["6 of 6 images are one and the same", "6 of 6 images are equal"]),
    ],
)
def test_repeated_images_are_counted(values, labels, said):
    half = len(labels) // 2
    whole = images(list(values), labels)
    notes = repeats([whole.subset(torch.arange(half)), whole.subset(torch.arange(half, len(labels)))])
    assert all(each in " ".join(notes) for each in said) and bool(notes) == bool(said)


def test_images_of_one_colour_are_counted():
    flat = torch.arange(30, dtype=torch.uint8).view(10, 3, 1, 1).expand(10, 3, 4, 4)  # a colour each, none grey
    assert (
        "10 of 10 images have one colour all over" in repeats([ImageSet(flat, torch.zeros(10, dtype=torch.int64))])[0]
    )
    nearly = flat.clone()
    nearly[:, 2, 0, 0] += 1
    assert not repeats([ImageSet(nearly, torch.zeros(10, dtype=torch.int64))])
    assert repeats([ImageSet(flat[:0], torch.zeros(0, dtype=torch.int64))]) == []
