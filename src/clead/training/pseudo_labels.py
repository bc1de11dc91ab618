"""What a trained model takes images without a label for, as labels to train with (self-training)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.interfaces import ImageSet, Splits
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.output import tell
from clead.tasks.classification import CLASSIFICATION

PSEUDO_LABELS = "pseudo_labels.safetensors"
"""In the directory of a run or of a stage: the pseudo-labels that it was trained with, and how many of them are right."""


def pseudo_labels(
    model: SplitModel, splits: Splits, name: str, device: torch.device, order: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Label all training images, and auxiliary ones, once (Carmon et al. 2019, arXiv:1905.13736, algorithm 1).

    Args:
        model: the teacher; moved to ``device``.
        splits: images of which some have no label that training may see; ``labelled`` says which.
        name: of the teacher, for the record.
        device: where it computes.
        order: the data's number of each class of the teacher, (K,) int64; None: the same.

    Returns:
        ``labels``, (N,) int64, if some of the N training images have none, ``extra`` likewise of auxiliary images, and what to
        know of them; ``agreement``, with the hidden labels, is for the report alone.
    """
    train, tensors = splits.train, {}
    about: dict[str, Any] = {"from": name, "data": splits.trained_on}
    with exact_float32(), attack_mode(model.to(device)), torch.no_grad():
        for key, image_set in unlabelled_sets(splits).items():
            predicted = [
                CLASSIFICATION.predict(model(to_float(images.to(device)))).cpu()
                for images in image_set.images.split(512)
            ]
            tensors[key] = torch.cat(predicted) if order is None else order[torch.cat(predicted)]
    if train.labelled is not None:
        unlabelled = ~train.labelled
        about["unlabelled"] = int(unlabelled.sum())
        about["agreement"] = (tensors["labels"] == train.labels)[unlabelled].double().mean().item()
    if "extra" in tensors:
        about["extra"] = len(tensors["extra"])
    return tensors, about


def unlabelled_sets(splits: Splits) -> dict[str, ImageSet]:
    """Return the training images, ``labels``, and the auxiliary ones, ``extra``, as far as some of them have no label."""
    sets = {"labels": splits.train, "extra": splits.train.extra}
    return {key: each for key, each in sets.items() if each is not None and each.labelled is not None}


def with_pseudo_labels(
    splits: Splits, tensors: dict[str, Tensor], about: dict[str, Any], *, source: str, file: Path | None, show: bool
) -> Splits:
    """Return ``splits`` with these pseudo-labels; raises UserError if they, ``kept`` in a file, are of other images."""
    sets = unlabelled_sets(splits)
    shapes = {key: each.labels.shape for key, each in sets.items()}
    if {key: each.shape for key, each in tensors.items()} != shapes or about["data"] != splits.trained_on:
        raise UserError(f"{file} is of other images; --resume continues on the same data: restore it, or train anew")
    if show and "agreement" in about:
        sentence = f"{about['agreement']:.1%} of {about['unlabelled']} pseudo-labels by {source} are right"
        tell(f"{sentence} (by the hidden labels, which training does not see)")
    if show and "extra" in about:
        counts = torch.bincount(tensors["extra"], minlength=len(splits.classes))
        few, many = (splits.classes[int(k)] for k in (counts.argmin(), counts.argmax()))
        tell(
            f"{about['extra']} auxiliary images have labels by {source}: {int(counts.min())} ({few}) to {int(counts.max())} "
            f"({many}) per class"
        )
    return _replaced(splits, tensors)


def without_pseudo_labels(splits: Splits) -> Splits:
    """Return ``splits`` as they were before a model has labelled images."""
    return _replaced(splits, {})


def _replaced(splits: Splits, tensors: dict[str, Tensor]) -> Splits:
    extra = splits.train.extra
    if extra is not None:
        extra = dataclasses.replace(extra, pseudo_labels=tensors.get("extra"))
    train = dataclasses.replace(splits.train, pseudo_labels=tensors.get("labels"), extra=extra)
    return dataclasses.replace(splits, train=train)
