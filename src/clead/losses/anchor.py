"""Terms that hold features where those of another model are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.losses.precision import at_least_float32


def relative_distance(features: Tensor, anchors: Tensor) -> Tensor:
    """‖h − a‖² over the batch's mean of ‖a‖² per image: the loss of FARE (Schlarmann et al. 2024, arXiv:2402.12336, eq. 2).

    Departure: it is divided by the size of the anchors, so that one weight suits networks whose features differ in scale.

    Args:
        features: (B, D).
        anchors: (B, D), held fixed.

    Returns:
        (B,) float32, ≥ 0.

    >>> relative_distance(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([0.4000, 0.0000])
    """
    with torch.autocast(features.device.type, enabled=False):
        features, anchors = at_least_float32(features), at_least_float32(anchors).detach()
        scale = anchors.square().sum(1).mean().clamp_min(torch.finfo(anchors.dtype).tiny)
        return (features - anchors).square().sum(1) / scale


def prototype_cross_entropy(features: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """−log softmax_k(cos(h, P_k) / τ) at the label: the loss of TeCoA (Mao et al. 2023, arXiv:2212.07016, eq. 4).

    There P_k is a text's embedding; here it is any fixed vector of class k.

    Args:
        features: (B, D).
        prototypes: (K, D), of any length; a class whose prototype is 0 has cosine 0.
        labels: (B,) int64 in [0, K).
        temperature: τ > 0.

    Returns:
        (B,) float32, ≥ 0.

    >>> prototype_cross_entropy(torch.tensor([[3.0, 0.0]]), torch.eye(2), torch.tensor([0]), 1.0)
    tensor([0.3133])
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = F.normalize(at_least_float32(features), dim=1) @ F.normalize(at_least_float32(prototypes), dim=1).T
        return F.cross_entropy(cosines / temperature, labels, reduction="none")
