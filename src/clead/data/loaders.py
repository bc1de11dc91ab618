"""Batches from images in memory: functions of (seed, epoch, index) alone, so that resuming is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from clead.data.views import Augmentation
from clead.interfaces import Batch, ImageSet

_ORDER, _FIRST_VIEW, _SECOND_VIEW = 1, 2, 3  # one random stream each


def seeded(device: torch.device | str, *integers: int) -> torch.Generator:
    """Return a generator on ``device``, its stream decided by the integers (of any size) and their order.

    >>> a, b, c = (torch.rand(1, generator=seeded("cpu", *key)).item() for key in [(1, 2), (1, 2), (2, 1)])
    >>> a == b, a == c
    (True, False)
    """
    digest = hashlib.blake2b(repr(tuple(map(int, integers))).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits suit every device


class Loader:
    """Training batches; the uint8 images stay on the device, and views are drawn there.

    A last batch of a single image is dropped (batch normalisation cannot train on it), unless ``batch_size``
    is 1. A batch size above the number of images gives one batch of them all.

    Args:
        image_set: the images; copied to ``device``.
        batch_size: images per batch, ≥ 1.
        device: where batches are made.
        seed: decides order and views.
        shuffle: draw a new order every epoch.
        drop_last: leave out the last, smaller batch.
        augment: makes ``Batch.images``; None for the plain images.
        view: makes ``Batch.second_view`` from the plain images; None for no second view.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        augment: Augmentation | None = None,
        view: Augmentation | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(image_set) == 0:
            raise ValueError("a loader needs at least one image, got an empty set")
        self.device = torch.device(device)
        self.images = image_set.images.to(self.device)
        self.labels = image_set.labels.to(self.device)
        self.batch_size = batch_size
        self.seed, self.shuffle = seed, shuffle
        self.augment, self.view = augment, view
        full, rest = divmod(len(image_set), batch_size)
        self.steps_per_epoch: int = full + int(full == 0 or (rest > 1 and not drop_last))
        """Batches in one epoch, ≥ 1."""
        self._epoch_of_order: int | None = None
        self._order = torch.arange(len(image_set), device=self.device)

    def batch(self, epoch: int, index: int) -> Batch:
        """Return batch ``index`` (0 … steps_per_epoch - 1) of ``epoch``; raises IndexError outside."""
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"batch index must be in [0, {self.steps_per_epoch}), got {index}")
        chosen = self._order_of(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        plain, labels = _as_float(self.images[chosen]), self.labels[chosen]
        first = self._draw(self.augment, plain, epoch, index, _FIRST_VIEW)
        second = None if self.view is None else self._draw(self.view, plain, epoch, index, _SECOND_VIEW)
        return Batch(first, labels, second, index=chosen)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from batch ``start`` on."""
        for index in range(start, self.steps_per_epoch):
            yield self.batch(epoch, index)

    def _draw(self, augment: Augmentation | None, plain: Tensor, epoch: int, index: int, stream: int) -> Tensor:
        if augment is None:
            return plain
        return augment(plain, generator=seeded(self.device, self.seed, epoch, index, stream))

    def _order_of(self, epoch: int) -> Tensor:
        if self.shuffle and epoch != self._epoch_of_order:
            # Drawn on the CPU, so that every device sees the same order.
            order = torch.randperm(len(self.labels), generator=seeded("cpu", self.seed, epoch, _ORDER))
            self._order, self._epoch_of_order = order.to(self.device), epoch
        return self._order


def _as_float(images: Tensor) -> Tensor:
    return images.float().div_(255)
