"""How well scores part clean from adversarial images, and the threshold that keeps to a rate."""

from __future__ import annotations

import math

import torch
from scipy.stats import rankdata
from torch import Tensor


def auroc(clean: Tensor, adversarial: Tensor) -> float:
    """Return P(adversarial score > clean score) + P(equal)/2, the area under the ROC curve (Mann & Whitney 1947).

    >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    ranks = rankdata(torch.cat([adversarial, clean]).double().numpy())
    n, m = len(adversarial), len(clean)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fpr_at_tpr(clean: Tensor, adversarial: Tensor, tpr: float = 0.95) -> float:
    """Return the fraction of clean scores at or above the largest threshold that ``tpr`` of the adversarial scores reach.

    >>> fpr_at_tpr(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0]))
    0.5
    """
    needed = max(1, math.ceil(tpr * len(adversarial) - 1e-9))
    threshold = adversarial.sort(descending=True).values[needed - 1]
    return (clean >= threshold).double().mean().item()


def threshold_at(scores: Tensor, rate: float) -> float:
    """Return t so that a fresh clean image has a score above t with probability ≤ ``rate``; infinity where no t is sure to.

    The ⌈(n + 1)(1 − rate)⌉-th smallest of n calibration scores (split conformal prediction; Vovk et al. 2005, sections 2 and 4).

    >>> threshold_at(torch.arange(1.0, 10.0), 0.2), threshold_at(torch.arange(1.0, 10.0), 0.05)
    (8.0, inf)
    """
    place = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    return math.inf if place > len(scores) else scores.sort().values[max(place, 1) - 1].item()
