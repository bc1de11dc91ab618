"""What a contrastive term is computed from: the forward of the views, and the unit vectors that are contrasted."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.losses.precision import at_least_float32
from clead.models.split import SplitModel

Level = Literal["embedding", "features", "logits"]


class Outputs(NamedTuple):
    """What a forward of one view gives: features (B, D) and logits (B, K)."""

    features: Tensor
    logits: Tensor


def forward(model: SplitModel, views: dict[str, Tensor], *, separate: bool = False) -> dict[str, Outputs]:
    """Return the outputs of each view, name -> Outputs.

    Args:
        model: in any mode.
        views: name -> images (B, C, H, W).
        separate: forward each view by itself, instead of all in one batch.
    """
    if separate or len(views) == 1:
        return {name: Outputs(*model.features_and_logits(view)) for name, view in views.items()}
    outputs = model.features_and_logits(torch.cat(list(views.values())))
    chunks = [output.chunk(len(views)) for output in outputs]
    return {name: Outputs(*of_view) for name, *of_view in zip(views, *chunks, strict=True)}


def unit_vectors(model: SplitModel, outputs: Outputs, level: Level) -> Tensor:
    """Return what is contrasted, (B, d) of unit length: p(h) (embedding), h (features) or g(h) (logits), each over its norm."""
    if level == "embedding":
        return model.embedding(outputs.features)
    with torch.autocast(outputs.logits.device.type, enabled=False):
        return F.normalize(at_least_float32(outputs.features if level == "features" else outputs.logits), dim=1)
