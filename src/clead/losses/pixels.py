"""Losses of masks, one value per image: what attacks on segmentation maximise (Croce, Singh & Hein 2023, arXiv:2306.12941).

``logits`` are (B, K, H, W), ``target`` is (B, H, W) int64 in [0, K), or ``VOID`` where a pixel counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.losses.precision import at_least_float32

VOID = 255
"""Pixels of this class are neither right nor wrong."""


def pixel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of −log p_y over the pixels that are not void, (B,) float32.

    >>> logits = torch.tensor([[[[0.0, 5.0]], [[0.0, 0.0]]]])
    >>> pixel_cross_entropy(logits, torch.tensor([[[1, VOID]]]))
    tensor([0.6931])
    """
    return _mean(_cross_entropy(logits, target), target != VOID)


def masked_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the pixels of 1[argmax z = y] · −log p_y, (B,): a pixel that is wrong already leaves the sum."""
    return _mean(_cross_entropy(logits, target) * (logits.argmax(1) == target), target != VOID)


def balanced_masked_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The masked cross-entropy with every class of an image counting alike, whatever its pixels, (B,).

    1/|C| Σ_{c ∈ C} 1/N_c Σ_{pixels of c} 1[argmax z = c] · −log p_c, where C are the classes of the image's mask.
    """
    classes = target.where(target != VOID, logits.shape[1]).flatten(1)
    pixels = classes.new_zeros(len(classes), logits.shape[1] + 1).scatter_add_(1, classes, torch.ones_like(classes))
    pixels[:, -1] = 0
    weights = 1 / (pixels.clamp_min(1) * (pixels > 0).sum(1, keepdim=True).clamp_min(1)).float()
    weights = weights.gather(1, classes).reshape(target.shape)
    value = _cross_entropy(logits, target) * (logits.argmax(1) == target)
    return (value * weights).flatten(1).sum(1)


def js_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the pixels of the Jensen–Shannon divergence of p and the target's one-hot vector, (B,), at most log 2.

    log 2 + (p_y log p_y − (1 + p_y) log(1 + p_y)) / 2, so that pixels which are wrong for certain have no gradient.
    """
    log_p = -_cross_entropy(logits, target)
    p = log_p.exp()
    return _mean(math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2, target != VOID)


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": pixel_cross_entropy,
    "masked_cross_entropy": masked_cross_entropy,
    "balanced_masked_cross_entropy": balanced_masked_cross_entropy,
    "js_divergence": js_divergence,
}
"""What an attack on masks can maximise, by name."""


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−log p_y of each pixel, 0 where it is void, (B, H, W)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits), target, ignore_index=VOID, reduction="none")


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of ``values`` over the pixels that are counted, (B,); 0 of an image that has none."""
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)
