"""Stripes: their direction is their class."""

import torch
from clead.data.datasets.stripes import Stripes


def test_lying_stripes_change_from_row_to_row():
    splits = Stripes(images=50).load(0)
    assert splits.classes == ("lying", "standing") and len(splits.test) == 10
    x = splits.test.images.float()
    down, across = (x.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3))
    assert torch.equal((across > down).long(), splits.test.labels)
