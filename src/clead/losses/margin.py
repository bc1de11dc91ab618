"""Cross-entropy and margin losses of logits, one value per image; an attack maximises them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.losses.precision import at_least_float32


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)_y per image; (B, K) and (B,) give (B,) float32."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k≠y} logit_k − logit_y per image, above 0 iff misclassified (Carlini & Wagner 2017, arXiv:1608.04644, f_6).

    >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([-1.])
    """
    logits = at_least_float32(logits)
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong_logits = logits.scatter(1, labels[:, None], -torch.inf)
    return wrong_logits.amax(1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """−(z_y − max_{k≠y} z_k) / (z_π1 − z_π3): the margin, invariant to shift and scale of the logits.

    Source: Croce & Hein 2020, arXiv:2003.01690, eq. 6. Raises UserError for fewer than 3 classes, where z_π3 does not exist.
    """
    if logits.shape[1] < 3:
        raise UserError(f"the DLR loss needs at least 3 classes, got {logits.shape[1]}; use the margin instead")
    ordered = at_least_float32(logits).topk(3, dim=1).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
