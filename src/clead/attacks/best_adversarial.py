"""The best image so far of an attack for the smallest perturbation.

Such an attack has no radius: it looks for the nearest adversarial image. It serves as a search inside a threat set too: what
it finds there counts, the rest is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clead.threats import THREATS
from clead.threats.geometry import per_image


class BestAdversarial:
    """The smallest adversarial image found so far of each of ``x``: ``images``, and their ``sizes``, infinite where there is none.

    Args:
        x: (B, C, H, W) in [0, 1].
        norm: a name of ``THREATS``, which measures.
    """

    def __init__(self, x: Tensor, norm: str) -> None:
        self._x = x
        self._measure = THREATS.get(norm)(eps=0).distance
        self.images = x.clone()
        self.sizes = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)

    def offer(self, index: Tensor, x_adv: Tensor, margin: Tensor) -> Tensor:
        """Keep those of ``x_adv``, images of x[index], that are misclassified and smaller than before; returns which are wrong.

        margin: the task's, of ``x_adv``; above 0 is wrong. NaN counts as wrong, and an image that is NaN itself replaces any other:
        ``run_attack`` then says that the gradient is broken instead of taking the model for robust.
        """
        wrong = ~(margin <= 0)
        size = self._measure(x_adv - self._x[index])
        smaller = wrong & ~(size >= self.sizes[index])
        self.images[index[smaller]] = x_adv[smaller]
        self.sizes[index[smaller]] = size[smaller].to(self.sizes.dtype)
        return wrong

    def left(self, enough: float) -> Tensor:
        """Return the index, (n,) int64, of the images whose best is larger than ``enough``, so that the search goes on."""
        return (self.sizes > enough).nonzero()[:, 0]  # synchronises the device

    def within(self, eps: float) -> Tensor:
        """Return the images no larger than ``eps``, and x itself for the others."""
        return torch.where(per_image(self.sizes > eps, self._x), self._x, self.images)
