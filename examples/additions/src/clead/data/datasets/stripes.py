"""Stripes that lie or stand, made on the spot: a first data set for trying things out."""

from __future__ import annotations

import torch

from clead.data.base import InMemoryDataset, RawSplit, RawSplits
from clead.data.datasets import DATASETS
from clead.settings import setting, settings


@DATASETS.register("stripes")
@settings
class Stripes(InMemoryDataset):
    """Grey images of noisy stripes, 16×16, that lie or stand; a fifth are test images."""

    images: int = setting(1000, "images of all splits together", ge=10, unit="images")

    def read(self) -> RawSplits:
        """Return the images; the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(self.images) % 2
        rows = 100 + 100 * (torch.arange(16) // 2 % 2).expand(self.images, 1, 16, 16)
        stripes = torch.where(labels[:, None, None, None] == 0, rows.transpose(2, 3), rows)
        noisy = stripes + 20 * torch.randn(stripes.shape, generator=generator)
        whole = RawSplit(noisy.clamp(0, 255).byte().contiguous(), labels)
        order, test = torch.arange(self.images), self.images // 5
        return RawSplits(whole.subset(order[test:]), whole.subset(order[:test]), ("lying", "standing"))
