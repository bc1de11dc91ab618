"""Training batches: functions of seed and place in the training alone, so that resuming is exact."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.data.streaming import StreamedImages
from clead.data.views import Augmentation
from clead.distributed import SINGLE_PROCESS, World
from clead.interfaces import Batch, ImageSet

# One random stream each.
_ORDER, _FIRST_VIEW, _SECOND_VIEW, _CUTMIX, _LABELLED_ORDER, _UNLABELLED_ORDER = 1, 2, 3, 4, 5, 6
_EXTRA_ORDER = 9  # 7 and 8 are the trainer's


def make_generator(device: torch.device | str, *integers: int) -> torch.Generator:
    """Return a generator on ``device``, its stream decided by the integers (of any size) and their order.

    >>> a, b, c = (torch.rand(1, generator=make_generator("cpu", *key)).item() for key in [(1, 2), (1, 2), (2, 1)])
    >>> a == b, a == c
    (True, False)
    """
    digest = hashlib.blake2b(repr(tuple(map(int, integers))).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits suit every device


@dataclass(frozen=True)
class ViewSettings:
    """What batches have of each image.

    Attributes:
        first: makes ``Batch.images``; None for the plain images.
        second: makes ``Batch.second_view`` from the plain images; None for no second view.
        cutmix: α of ``cutmix``, which mixes ``Batch.images`` after ``first`` and makes ``Batch.soft_labels``; 0: off.
        num_classes: K, needed for soft labels.
        stored: one more image for each image of the set, (N, C, H, W) float, of which ``Batch.stored`` is made.
    """

    first: Augmentation | None = None
    second: Augmentation | None = None
    cutmix: float = 0.0
    num_classes: int | None = None
    stored: Tensor | None = None


@dataclass(frozen=True)
class _Pool:
    """Images of which every batch has ``count``: each group of ``groups``, positions (n,) int64, comes equally often."""

    stream: int
    groups: Sequence[Tensor]
    count: int


class Loader:
    """Training batches; the uint8 images stay on the device, and views are drawn there.

    A last batch of a single image is dropped (batch normalisation cannot train on it), unless ``batch_size``
    is 1. A batch size above the number of images gives one batch of them all.

    ``Batch.labels`` are −1 where ``image_set.labelled`` hides them, so that a method that overlooks ``Batch.labelled`` fails.
    With a ``labelled_share`` s < 1, of B images (at most N) round(s·B) are labelled and the others not, one at least of each; all
    batches are full, and an epoch is one pass over the unlabelled images. Either kind comes in random order, all before one comes
    again, so a batch may hold an image twice. With s = 1 all are labelled, and an epoch is N images long all the same.

    With ``extra`` images, round(``extra_share``·B) of B are drawn from those, likewise; the N images share the rest, and an epoch
    is one pass over them (over the unlabelled ones of them, with a labelled share). ``Batch.index`` is N + j for extra image j.

    With ``balanced``, the classes come in random order, all before one comes again, and so do the images of a class; an epoch is N
    images long, of which rare classes fill as many as others.

    Args:
        image_set: the images; copied to ``device``, unless they are streamed.
        batch_size: images per batch, ≥ 1.
        device: where batches are made.
        seed: decides order and views.
        drop_last: leave out the last, smaller batch.
        views: what is made of each image; None: the plain image.
        world: each of its processes gets an equal part of every batch; random numbers are drawn for the whole batch.
        microbatches: so many equal parts, one after another, make the part of a process.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        drop_last: bool = False,
        views: ViewSettings | None = None,
        world: World = SINGLE_PROCESS,
        microbatches: int = 1,
    ) -> None:
        self.views = views = views or ViewSettings()
        self.device = torch.device(device)
        self.images, labels = image_set.images.to(self.device), image_set.visible_labels
        if (extra := image_set.extra) is not None:
            self.images = torch.cat([self.images, extra.images.to(self.device)])
            labels = torch.cat([labels, extra.visible_labels])
        self.labels = labels.to(self.device)
        self.stored = None if views.stored is None else views.stored.to(self.device)
        self.batch_size = batch_size
        self.seed = seed
        self.world, self.shares = world, world.world_size * microbatches
        full, rest = divmod(len(image_set), batch_size)
        self.steps_per_epoch: int = full + int(full == 0 or (rest > 1 and not drop_last))
        """Batches in one epoch, ≥ 1."""
        self._orders: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        self._pools: list[_Pool] | None = None
        self.labelled: Tensor | None = None
        if labels.dim() == 1 and bool((labels < 0).any()) and image_set.labelled_share != 1:
            self.labelled = (labels >= 0).to(self.device)
        share = None if image_set.labelled is None else image_set.labelled_share
        if share is not None or image_set.extra is not None or image_set.balanced:
            self._use_pools(image_set, share)

    def _use_pools(self, image_set: ImageSet, share: float | None) -> None:
        """Part batches between labelled, unlabelled and extra images, and set how long an epoch is."""
        total, pools = len(image_set), []
        size = count = min(self.batch_size, total)
        if image_set.extra is not None:
            pools.append((_EXTRA_ORDER, torch.arange(total, len(self.labels)), _share_of(image_set.extra_share, size)))
            count = size - pools[0][2]
        if share is None:
            pools.insert(0, (_ORDER, torch.arange(total), count))
            if image_set.extra is not None:
                self.steps_per_epoch = max(1, total // count)
        else:
            assert image_set.labelled is not None
            known, unknown = (flags.nonzero()[:, 0] for flags in (image_set.labelled, ~image_set.labelled))
            labelled = count if share == 1 else _share_of(share, count)
            pools[:0] = [(_LABELLED_ORDER, known, labelled), (_UNLABELLED_ORDER, unknown, count - labelled)]
            self.steps_per_epoch = max(1, total // count if share == 1 else len(unknown) // (count - labelled))
        labels = self.labels.cpu()
        self._pools = [
            _Pool(stream, _groups(pool.to(self.device), labels[pool] if image_set.balanced else None), amount)
            for stream, pool, amount in pools
            if amount
        ]

    def batch(self, epoch: int, index: int, progress: float = 0.0) -> Batch:
        """Return batch ``index`` (0 … steps_per_epoch - 1) of ``epoch``.

        ``progress``, the part of the training that lies behind, in [0, 1), says how strong an annealed augmentation is.
        """
        chosen = self._chosen(epoch, index)
        local = None if self.shares == 1 else self.positions(len(chosen))
        plain = _as_float(self.images[self._read(chosen)].to(self.device))
        if isinstance(self.images, StreamedImages):
            after = (epoch, index + 1) if index + 1 < self.steps_per_epoch else (epoch + 1, 0)
            self.images.prefetch(self._read(self._chosen(*after)))
        if len(plain) < len(chosen):  # views are drawn for the whole batch; the images of others are black
            whole = plain.new_zeros(len(chosen), *plain.shape[1:])
            whole[local] = plain
            plain = whole
        labels = self.labels[chosen].long()
        first, labels = self._first_view(plain, labels, progress, epoch, index)
        second = (
            None
            if self.views.second is None
            else self._draw(self.views.second, plain, progress, epoch, index, _SECOND_VIEW)
        )
        soft = None
        if self.views.cutmix:
            assert self.views.num_classes is not None
            # Drawn on the CPU, so that every device sees the same boxes.
            generator = make_generator("cpu", self.seed, epoch, index, _CUTMIX)
            first, soft = cutmix(first, labels, self.views.num_classes, self.views.cutmix, generator=generator)
        if local is not None:
            chosen, first, labels = chosen[local], first[local], labels[local]
            second, soft = (None if each is None else each[local] for each in (second, soft))
        stored = None if self.stored is None else self.stored[chosen].float()
        labelled = None if self.labelled is None else self.labelled[chosen]
        return Batch(first, labels, second, index=chosen, soft_labels=soft, labelled=labelled, stored=stored)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from batch ``start`` on."""
        for index in range(start, self.steps_per_epoch):
            yield self.batch(epoch, index)

    def _first_view(self, plain: Tensor, labels: Tensor, progress: float, *key: int) -> tuple[Tensor, Tensor]:
        """Return the first view of the images and their labels; masks (B, H, W) are moved as the images are."""
        augment = self.views.first
        if augment is None or labels.dim() != 3:
            return self._draw(augment, plain, progress, *key, _FIRST_VIEW), labels
        generator = make_generator(self.device, self.seed, *key, _FIRST_VIEW)
        return augment.with_masks(plain, labels, generator=generator, strength=augment.strength(progress))

    def _draw(self, augment: Augmentation | None, plain: Tensor, progress: float, *key: int) -> Tensor:
        if augment is None:
            return plain
        generator = make_generator(self.device, self.seed, *key)
        return augment(plain, generator=generator, strength=augment.strength(progress))

    def positions(self, batch_size: int) -> Tensor:
        """Return which images of a batch are this process's, (batch_size / world size,) int64, microbatch by microbatch."""
        order = torch.arange(batch_size, device=self.device)
        if self._pools is not None and self.shares > 1:  # each share of the batch gets its share of every kind
            places = [(torch.arange(each.count, device=self.device) + 0.5) / each.count for each in self._pools]
            order = torch.cat(places).argsort(stable=True)
        return order[self.world.local_slice(batch_size)]

    def _read(self, chosen: Tensor) -> Tensor:
        """Return which images of a batch have to be read: this process's own, or all where images are mixed."""
        return chosen if self.world.world_size == 1 or self.views.cutmix else chosen[self.positions(len(chosen))]

    def _chosen(self, epoch: int, index: int) -> Tensor:
        """Return which images are in a batch, (B,) int64."""
        if self._pools is None:
            order = self._order_of((_ORDER,), epoch, len(self.labels))
            return order[index * self.batch_size : (index + 1) * self.batch_size]
        step = epoch * self.steps_per_epoch + index
        return torch.cat([self._drawn(pool, step * pool.count, (step + 1) * pool.count) for pool in self._pools])

    def _drawn(self, pool: _Pool, begin: int, end: int) -> Tensor:
        """Return the images of a pool from the ``begin``-th that is drawn of it to the one before the ``end``-th."""
        k = len(pool.groups)
        if k == 1:
            return self._images_of((pool.stream,), pool.groups[0], begin, end)
        first, last = begin // k, -(-end // k)
        turns = torch.arange(first, last).repeat_interleave(k)[begin - first * k : end - first * k]
        orders = torch.cat([self._order_of((pool.stream, -1), turn, k) for turn in range(first, last)])
        groups = orders[begin - first * k : end - first * k].cpu()
        chosen = torch.empty(end - begin, dtype=torch.int64, device=self.device)
        for number in groups.unique().tolist():
            places = groups == number
            between = turns[places]
            key, group = (pool.stream, -1, number), pool.groups[number]
            images = self._images_of(key, group, int(between[0]), int(between[-1]) + 1)
            chosen[places.to(self.device)] = images
        return chosen

    def _images_of(self, stream: tuple[int, ...], group: Tensor, begin: int, end: int) -> Tensor:
        """Return the images of a group from the ``begin``-th that is drawn of it to the one before the ``end``-th."""
        pieces = []
        while begin < end:
            turn, first = divmod(begin, len(group))
            piece = self._order_of(stream, turn, len(group))[first : first + end - begin]
            pieces.append(group[piece])
            begin += len(piece)
        return torch.cat(pieces) if pieces else group[:0]

    def _order_of(self, stream: tuple[int, ...], turn: int, count: int) -> Tensor:
        """Return the order of ``count`` images when they come for the ``turn``-th time."""
        cached = self._orders.get(stream)
        if cached is None or cached[0] != turn:
            # Drawn on the CPU, so that every device sees the same order.
            generator = make_generator("cpu", self.seed, turn, *stream)
            if isinstance(self.images, StreamedImages):
                order = self.images.shuffled(generator)
            else:
                order = torch.randperm(count, generator=generator)
            self._orders[stream] = cached = (turn, order.to(self.device))
        return cached[1]


def _share_of(share: float, count: int) -> int:
    """Return how many of ``count`` images a share is: one at least, and one less than all at most."""
    return min(max(1, round(share * count)), count - 1)


def _groups(pool: Tensor, labels: Tensor | None) -> list[Tensor]:
    """Return the images of a pool by their labels, or together."""
    if labels is None:
        return [pool]
    return [pool[labels.to(pool.device) == label] for label in labels.unique().tolist()]


def cutmix(
    images: Tensor, labels: Tensor, num_classes: int, alpha: float, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Put a box of another image of the batch into each image: x̃ = M ⊙ x + (1 − M) ⊙ x', ỹ = λ·y + (1 − λ)·y'.

    Source: Yun et al. 2019, arXiv:1905.04899, eq. 1-2; in adversarial training Rebuffi et al. 2021, arXiv:2103.01946. Per batch one
    λ ~ Beta(α, α), one order of the partners, and one box of height H·√(1 − λ), width W·√(1 − λ) and a uniform centre. It is cut at
    the border, and λ in ỹ is the share of the pixels that are still x's.

    Args:
        images: (B, C, H, W).
        labels: (B,) int64 in [0, K).
        num_classes: K.
        alpha: α > 0; 1 in the papers, so λ is uniform.
        generator: on the CPU.

    Returns:
        x̃, (B, C, H, W), and ỹ, (B, K) float32, on the device of the images.
    """
    height, width = images.shape[2:]
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    # The first of Dirichlet(α, α) is Beta(α, α); torch.distributions takes no generator.
    share = torch._sample_dirichlet(torch.full((2,), alpha, dtype=torch.float64), generator=generator)[0]
    centre = torch.rand(2, generator=generator)
    rows, columns = (
        _window(size, round(size * math.sqrt(1 - share)), int(size * middle))
        for size, middle in zip((height, width), centre.tolist(), strict=True)
    )
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partner][:, :, rows, columns]
    kept_area = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    targets = F.one_hot(labels, num_classes).float()
    return mixed, kept_area * targets + (1 - kept_area) * targets[partner]


def _window(size: int, side: int, centre: int) -> slice:
    start = centre - side // 2
    return slice(max(0, start), min(size, start + side))


def _as_float(images: Tensor) -> Tensor:
    return images.float().div_(255)


def to_float(images: Tensor) -> Tensor:
    """Return float images in [0, 1]; uint8 is divided by 255, float is taken as it is, and what is streamed is read."""
    images = images[:]
    return images.float() / 255 if images.dtype == torch.uint8 else images.float().clone()
