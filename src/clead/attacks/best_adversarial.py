"""Attacks for the smallest perturbation, and the best image so far of one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from clead.interfaces import Model, Threat
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION
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


class NearestSearch(ABC):
    """An attack that has no radius: it looks for the nearest adversarial image.

    It serves as a search inside a threat set too: what it finds there counts, the rest is dropped.
    """

    @abstractmethod
    def nearest(self, model: Model, x: Tensor, y: Tensor, norm: str, task: Task, enough: float) -> BestAdversarial:
        """Return the nearest misclassified images found; one no farther than ``enough`` need not be improved."""

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        task: Task = CLASSIFICATION,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return x_adv, (B, C, H, W): the nearest found, where that lies in the threat set; x elsewhere."""
        eps = float(threat.eps)
        return self.nearest(model, x, y, threat.norm, task, eps).within(eps)

    def minimal(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        norm: str,
        task: Task = CLASSIFICATION,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the nearest misclassified image found, (B, C, H, W) in [0, 1]; x where there is none."""
        return self.nearest(model, x, y, norm, task, 0.0).images
