"""What a trained model takes images without a label for, as labels to train with (self-training)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.interfaces import Splits
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.output import tell
from clead.tasks.classification import CLASSIFICATION

PSEUDO_LABELS = "pseudo_labels.safetensors"
"""In the directory of a run or of a stage: the pseudo-labels that it was trained with, and how many of them are right."""


def pseudo_labels(
    model: SplitModel, splits: Splits, name: str, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Label all training images, once (Carmon et al. 2019, arXiv:1905.13736, algorithm 1).

    Args:
        model: the teacher; moved to ``device``.
        splits: images of which some have no label that training may see; ``train.labelled`` says which.
        name: of the teacher, for the record.
        device: where it computes.

    Returns:
        ``labels``, (N,) int64, and what to know of them; ``agreement``, with the hidden labels, is for the report alone.
    """
    train = splits.train
    assert train.labelled is not None
    with exact_float32(), attack_mode(model.to(device)), torch.no_grad():
        labels = torch.cat(
            [CLASSIFICATION.predict(model(to_float(images.to(device)))).cpu() for images in train.images.split(512)]
        )
    unlabelled = ~train.labelled
    about = {
        "from": name,
        "data": splits.fingerprint,
        "unlabelled": int(unlabelled.sum()),
        "agreement": (labels == train.labels)[unlabelled].double().mean().item(),
    }
    return {"labels": labels}, about


def with_pseudo_labels(
    splits: Splits, tensors: dict[str, Tensor], about: dict[str, Any], *, source: str, file: Path | None, show: bool
) -> Splits:
    """Return ``splits`` with these pseudo-labels; raises UserError if they, ``kept`` in a file, are of other images."""
    train = splits.train
    if tensors["labels"].shape != train.labels.shape or about["data"] != splits.fingerprint:
        raise UserError(f"{file} is of other images; --resume continues on the same data: restore it, or train anew")
    if show:
        sentence = f"{about['agreement']:.1%} of {about['unlabelled']} pseudo-labels by {source} are right"
        tell(f"{sentence} (by the hidden labels, which training does not see)")
    return dataclasses.replace(splits, train=dataclasses.replace(train, pseudo_labels=tensors["labels"]))
