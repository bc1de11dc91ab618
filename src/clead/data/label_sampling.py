"""Which training images are chosen, which of them have a label that training may look at, and labels that are wrong on purpose."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from clead.errors import UserError
from clead.interfaces import ImageSet

_LABELLED, _NOISE = 1, 2  # one random stream each, apart from the one that cuts validation images


def strata(labels: Tensor) -> Tensor:
    """Return what images are chosen evenly by, (N,) int64: their class; one and the same where a target is no class.

    >>> strata(torch.tensor([2, 0])), strata(torch.tensor([[0, 1], [1, 1]]))
    (tensor([2, 0]), tensor([0, 0]))
    """
    return labels if labels.dim() == 1 else torch.zeros(len(labels), dtype=torch.int64)


def label_keys(labels: Tensor) -> list[int]:
    """Return a number per image that is the same for the same label, mask or set of labels."""
    return labels.tolist() if labels.dim() == 1 else [hash(row.numpy().tobytes()) for row in labels]


def stratified(
    labels: Tensor, count: int, seed: int | tuple[int, ...], *, least: int = 1, spare: int = 1
) -> tuple[Tensor, Tensor]:
    """Choose ``count`` images at random with every class in proportion (largest remainders).

    The bounds ``least`` and ``spare`` hold even where that makes more or fewer than ``count``.

    Args:
        labels: (N,) int64, or (N, …), of which all count as of one class.
        count: images to choose, in [0, N].
        seed: decides which; the draw is NumPy's frozen legacy stream, equal on every machine and version.
        least: images to choose of each class at least, if it has so many.
        spare: images to leave over of each class at least, as far as ``least`` allows.

    Returns:
        The chosen indices and the others, both (n,) int64, ascending.
    """
    values = strata(labels).numpy()
    present, sizes = np.unique(values, return_counts=True)
    ideal = sizes * (count / max(1, len(values)))
    low = np.minimum(least, sizes)
    high = np.maximum(low, sizes - spare)
    quota = np.clip(np.floor(ideal), low, high).astype(int)
    for _ in range(abs(count - quota.sum())):
        if count > quota.sum():
            movable, step, wish = quota < high, 1, ideal - quota
        else:
            movable, step, wish = quota > low, -1, quota - ideal
        if not movable.any():
            break
        quota[np.where(movable, wish, -np.inf).argmax()] += step
    random = _random(seed)
    mask = np.zeros(len(values), dtype=bool)
    for label, size, amount in zip(present, sizes, quota, strict=True):
        mask[np.flatnonzero(values == label)[random.permutation(size)[:amount]]] = True
    return torch.from_numpy(np.flatnonzero(mask)), torch.from_numpy(np.flatnonzero(~mask))


def hide_labels(
    train: ImageSet, fraction: float, noise: float, num_classes: int, seed: int, *, share: float | None = None
) -> ImageSet:
    """Return the training images with few labels, some of them wrong.

    Args:
        train: the images with their true labels.
        fraction: part that keeps a label, in (0, 1], by class in proportion and at least one image of each class; 1: all.
        noise: part of the labels kept that are wrong, in [0, 1); see ``corrupt_labels``. Hidden labels stay true.
        num_classes: K.
        seed: decides which images, apart from what else it decides; a larger noise leaves the choice of labelled images as it is.
        share: of every batch that is drawn from labelled images, or None.
    """
    labelled = None
    if train.labels.dim() > 1 and (fraction < 1 or noise):
        raise UserError(
            f"data.labelled and data.label_noise are for one class per image, got {fraction:g} and {noise:g} with labels of shape "
            f"{tuple(train.labels.shape)}; leave them out"
        )
    if fraction < 1:
        chosen, rest = stratified(train.labels, round(fraction * len(train)), (seed, _LABELLED), spare=0)
        if len(rest):
            labelled = torch.zeros(len(train), dtype=torch.bool)
            labelled[chosen] = True
    labels = train.labels
    if noise:
        labels = labels.clone()
        where = torch.arange(len(labels)) if labelled is None else labelled.nonzero()[:, 0]
        labels[where] = corrupt_labels(labels[where], noise, num_classes, seed)
    return dataclasses.replace(train, labels=labels, labelled=labelled, labelled_share=share)


def corrupt_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> Tensor:
    """Return labels of which exactly round(``fraction``·N) are wrong, each another of the K − 1 classes, drawn uniformly.

    Symmetric label noise: Patrini et al. 2017, arXiv:1609.03683, section 5, whose share is met on average; here it is exact.

    Args:
        labels: (N,) int64 in [0, K).
        fraction: in [0, 1).
        num_classes: K ≥ 2.
        seed: decides which and what.

    >>> corrupt_labels(torch.zeros(10, dtype=torch.int64), 0.3, 2, seed=0).sum()
    tensor(3)
    """
    random = _random((seed, _NOISE))
    chosen = torch.from_numpy(random.permutation(len(labels))[: round(fraction * len(labels))])
    away = torch.from_numpy(random.randint(1, num_classes, len(chosen)))
    wrong = labels.clone()
    wrong[chosen] = (labels[chosen] + away) % num_classes
    return wrong


def for_method(train: ImageSet, uses_unlabelled: bool, *, balanced: bool = False) -> ImageSet:
    """Return the training images as a method gets to see them: one without a use for unlabelled images sees labelled ones only.

    They are still counted as N images, labelled or not: an epoch is N images long, and ``train.budget`` is per image of all N. So
    at the same budget every method computes as much, and one that uses only n labelled images sees each N/n times as often.
    """
    train = dataclasses.replace(train, balanced=balanced)
    if uses_unlabelled:
        return train
    if train.extra is not None:
        extra = train.extra.labelled_subset()
        train = dataclasses.replace(train, extra=extra if len(extra) else None)
    if train.labelled is None or train.pseudo_labels is not None:
        return train
    return dataclasses.replace(train, labelled_share=1.0)


def _random(seed: int | tuple[int, ...]) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
