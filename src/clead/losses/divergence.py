"""Divergences between predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.losses.precision import at_least_float32


def kl_divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target_logits) ‖ softmax(logits)) per image, the TRADES regulariser (Zhang et al. 2019, arXiv:1901.08573, eq. 5).

    Args:
        target_logits: (B, K), the clean prediction in TRADES; gradients flow into it too unless it is detached.
        logits: (B, K), the adversarial prediction.

    Returns:
        (B,) float32, ≥ 0.

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([0.1201])
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_q = F.log_softmax(at_least_float32(logits), dim=1)
        # The target as logarithms: where a probability underflows to 0, the gradient of p·log p by p is NaN.
        log_p = F.log_softmax(at_least_float32(target_logits), dim=1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def js_divergence(first: Tensor, second: Tensor) -> Tensor:
    """½·KL(p ‖ m) + ½·KL(q ‖ m) per image, p = softmax(first), q = softmax(second), m = (p + q) / 2 (Lin 1991).

    Args:
        first: (B, K) logits.
        second: (B, K) logits; gradients flow into both.

    Returns:
        (B,) float32, in [0, log 2].
    """
    with torch.autocast(first.device.type, enabled=False):
        log_p, log_q = (F.log_softmax(at_least_float32(logits), dim=1) for logits in (first, second))
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        from_p, from_q = (F.kl_div(log_m, each, reduction="none", log_target=True).sum(1) for each in (log_p, log_q))
        return (from_p + from_q) / 2


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos(a, b) per row; (B, D) and (B, D) give (B,) float32 in [0, 2]."""
    with torch.autocast(a.device.type, enabled=False):
        return 1 - F.cosine_similarity(at_least_float32(a), at_least_float32(b), dim=1)
