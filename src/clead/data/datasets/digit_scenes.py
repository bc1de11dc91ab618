"""Scenes of handwritten digits with a mask each, composed from scikit-learn's: no download."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from clead.data.base import InMemoryDataset, RawSplit, RawSplits
from clead.data.datasets import DATASETS
from clead.data.datasets.digits import Digits
from clead.data.masks import mask_problems, nearest
from clead.losses.pixels import VOID
from clead.settings import settings

_SIDE, _CELLS, _DIGIT = 32, 3, 8
_TRAIN, _TEST = 800, 200
_FAINT, _CLEAR = 0.2, 0.5  # ink below the first is canvas, from the second on digit, and void in between


@DATASETS.register("digit_scenes")
@settings
class DigitScenes(InMemoryDataset):
    """1,000 compositions, 32×32 RGB: 3 to 5 real digits of scikit-learn on a canvas with a random texture, with masks.

    Class 0 is the canvas, class 1 + k the digit k; faint ink is void. Test scenes are made of the test digits of ``digits``.
    """

    def problems(self) -> list[str]:
        """Return which settings do not go together, or not with masks, one line each."""
        return mask_problems(self) or InMemoryDataset.problems(self)

    def read(self) -> RawSplits:
        """Return the scenes; raises MissingExtra without scikit-learn."""
        digits = Digits().read()
        note = "the images are compositions: real digits of scikit-learn on random textures"
        train, test = scenes(digits.train, _TRAIN, 0), scenes(digits.test, _TEST, 1)
        if side := self.image_size:
            train, test = (replace(each, labels=nearest(each.labels, (side, side))) for each in (train, test))
        return RawSplits(train, test, ("canvas", *digits.classes), notes=(note,), ordered=True)


def scenes(digits: RawSplit, count: int, seed: int) -> RawSplit:
    """Return ``count`` scenes, (N, 3, 32, 32) uint8, and their masks, (N, 32, 32) uint8, drawn from ``seed``."""
    assert isinstance(digits.images, torch.Tensor)
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    ink, labels = digits.images[:, 0].numpy() / 255, digits.labels.numpy()
    images, masks = np.empty((count, _SIDE, _SIDE, 3)), np.zeros((count, _SIDE, _SIDE), np.uint8)
    room = _SIDE // _CELLS - _DIGIT
    for scene in range(count):
        coarse = random.uniform(0.1, 0.6, (4, 4, 3)).repeat(_SIDE // 4, 0).repeat(_SIDE // 4, 1)
        images[scene] = coarse + random.normal(0, 0.06, (_SIDE, _SIDE, 3))
        for cell in random.permutation(_CELLS**2)[: random.randint(3, 6)]:
            row, column = (index * (_SIDE // _CELLS) + random.randint(room + 1) for index in divmod(cell, _CELLS))
            place = (scene, slice(row, row + _DIGIT), slice(column, column + _DIGIT))
            chosen = random.randint(len(ink))
            opacity = ink[chosen][..., None]
            images[place] = (1 - opacity) * images[place] + opacity * random.uniform(0.6, 1, 3)
            drawn = np.where(ink[chosen] >= _CLEAR, 1 + labels[chosen], VOID)
            masks[place] = np.where(ink[chosen] < _FAINT, 0, drawn)
    pixels = (255 * images.clip(0, 1)).round().astype(np.uint8).transpose(0, 3, 1, 2)
    return RawSplit(torch.from_numpy(pixels.copy()), torch.from_numpy(masks))
