"""Handwritten digits, 8×8 grey, that come with scikit-learn: no download, seconds to train."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from clead.data.base import InMemoryDataset, RawSplit, RawSplits, default_names, stratified
from clead.data.datasets import DATASETS
from clead.errors import MissingExtra
from clead.settings import settings

_SPLIT_SEED = 0


@DATASETS.register("digits")
@settings
class Digits(InMemoryDataset):
    """1,797 handwritten digits, 8×8 grey; a fixed stratified fifth of them are the test images.

    The pixel values 0 … 16 become round(v · 255 / 16).
    """

    def read(self) -> RawSplits:
        """Return the digits; raises MissingExtra without scikit-learn."""
        library = find_spec("sklearn")
        if library is None or library.origin is None:
            raise MissingExtra("scikit-learn", "data", "the digits dataset")
        # The library's own file, as load_digits reads it: importing scikit-learn takes longer than evaluating a small model.
        table = np.loadtxt(Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        images = torch.from_numpy(np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8))
        whole = RawSplit(images, torch.from_numpy(table[:, 64].astype(np.int64)))
        test, train = stratified(whole.labels, round(0.2 * len(images)), _SPLIT_SEED)
        return RawSplits(whole.subset(train), whole.subset(test), default_names(whole.labels))
