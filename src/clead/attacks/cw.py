"""The attack of Carlini and Wagner: distance and margin weighed against each other, the weight by binary search."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.best_adversarial import BestAdversarial, NearestSearch
from clead.interfaces import Model
from clead.settings import setting, settings
from clead.tasks import Task
from clead.threats.geometry import flat

_INSIDE = 1 - 1e-6  # atanh of the box's border itself is infinite


@ATTACKS.register("cw")
@settings
class CW(NearestSearch):
    """min_w ‖x′ − x‖₂² + c · max(z_y − max_{k≠y} z_k, 0) with x′ = (tanh w + 1) / 2, by Adam; c by binary search.

    Source: Carlini & Wagner 2017, arXiv:1608.04644, sections V-B (f_6), VI-A and VI-D, with confidence 0. As in the authors'
    code c is multiplied by 10 until a first success, and Adam stops where the loss no longer falls. The paper takes 10,000
    steps and restarts; the default here is 1,000 and one start.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    targeted: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    steps: int = setting(1000, "Adam steps for one weight of the margin", ge=1, unit="steps")
    search_steps: int = setting(9, "weights of the margin that are tried per image", ge=1, unit="weights")
    step_size: float = setting(0.01, "Adam's step size", unit="units of w, whose tanh is the image", gt=0)
    weight: float = setting(1e-3, "first weight c of the margin against the squared distance", gt=0)

    def nearest(self, model: Model, x: Tensor, y: Tensor, norm: str, task: Task, enough: float) -> BestAdversarial:
        """Return the nearest misclassified points that Adam passes."""
        nearest = BestAdversarial(x, "l2")
        everything = torch.arange(len(x), device=x.device)
        nearest.offer(everything, x, task.margin(model(x), y))  # what is wrong already has distance 0
        weight = torch.full_like(nearest.sizes, self.weight)
        low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        for _ in range(self.search_steps):
            left = nearest.left(enough)
            if not len(left):
                break
            crossed = torch.zeros_like(weight, dtype=torch.bool)
            crossed[left] = self._descend(model, x[left], y[left], weight[left], left, nearest, task)
            high, low = torch.where(crossed, weight, high), torch.where(crossed, low, weight)
            weight = torch.where(high.isinf(), 10 * weight, (low + high) / 2)
        return nearest

    def _descend(
        self, model: Model, x: Tensor, y: Tensor, weight: Tensor, index: Tensor, nearest: BestAdversarial, task: Task
    ) -> Tensor:
        """Minimise for one weight per image, offering every point of the path; returns which images were ever wrong, (B,)."""
        w = ((2 * x - 1) * _INSIDE).atanh()
        adam = torch.optim.Adam([w], lr=self.step_size)
        crossed = torch.zeros_like(weight, dtype=torch.bool)
        before = torch.full_like(weight, torch.inf)
        for step in range(self.steps):
            with torch.enable_grad():
                w.requires_grad_()
                x_adv = (w.tanh() + 1) / 2
                lead = task.margin(model(x_adv), y)
                loss = flat(x_adv - x).square().sum(1) + weight * (-lead).clamp_min(0)
                (w.grad,) = torch.autograd.grad(loss.sum(), w)
            crossed |= nearest.offer(index, x_adv.detach(), lead.detach())
            if step % math.ceil(self.steps / 10) == 0:
                if not (loss < 0.9999 * before).any():  # synchronises the device
                    break
                before = loss.detach()
            adam.step()
        return crossed
