"""Labels of batches in which not every image has one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.interfaces import Batch
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.tasks.classification import CLASSIFICATION


def known_labels(model: SplitModel, batch: Batch, *, predict: bool) -> tuple[Batch, Tensor]:
    """Return the batch with the labels that may be looked at, and labels to attack.

    Args:
        model: asked in evaluation mode, once per image, if ``batch.labelled`` is given and ``predict`` is too.
        batch: as loaded; ``labelled`` (B,) bool is False where ``labels`` are not to be looked at, None where nowhere.
        predict: whether images without a label need one to be attacked.

    Returns:
        The batch, its ``labels`` −1 where there is none, its ``soft_labels`` one-hot where there was none, and (B,) int64:
        the labels, and where there is none the model's own predictions if ``predict``.
    """
    if batch.labelled is None:
        return batch, batch.labels
    labels = batch.labels.masked_fill(~batch.labelled, -1)
    attacked = labels
    if predict:
        with attack_mode(model), torch.no_grad():
            attacked = torch.where(labels < 0, CLASSIFICATION.predict(model(batch.images)), labels)
    soft = batch.soft_labels
    if soft is not None:
        one_hot = F.one_hot(attacked.clamp_min(0), soft.shape[1]).to(soft)
        soft = torch.where(batch.labelled[:, None], soft, one_hot)
    return batch._replace(labels=labels, soft_labels=soft), attacked


def classes(batch: Batch) -> Tensor:
    """Return the labels, (B,) int64, each image without one being in a class of its own, below 0."""
    return batch.labels if batch.labelled is None else distinct(batch.labels)


def distinct(labels: Tensor) -> Tensor:
    """Return the labels, (B,) int64, each of those below 0 replaced by another number below 0.

    >>> distinct(torch.tensor([3, -1, -1]))
    tensor([ 3, -2, -3])
    """
    singletons = -1 - torch.arange(len(labels), device=labels.device)
    return torch.where(labels < 0, singletons, labels)


def mean_of(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean of ``values``, (B,), where ``counted``, (B,) bool, or of all if None; 0 if nothing is counted.

    >>> mean_of(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([True, True, False])), mean_of(torch.ones(1), torch.tensor([False]))
    (tensor(2.), tensor(0.))
    """
    if counted is None:
        return values.mean()
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp_min(1)
