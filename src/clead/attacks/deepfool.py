"""DeepFool: step onto the nearest boundary of the linearised model until the class changes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.best_adversarial import BestAdversarial, NearestSearch
from clead.interfaces import Model
from clead.settings import setting, settings
from clead.tasks import Task
from clead.threats.geometry import flat, per_image, sign

_BEYOND = 1e-4


@ATTACKS.register("deepfool")
@settings
class DeepFool(NearestSearch):
    """x ← x + |f_k| / ‖w_k‖_q^q · |w_k|^(q−1) · sign(w_k), the class k nearest by |f_k| / ‖w_k‖_q, until the class changes.

    Source: Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithm 2 and eq. 10-12; f_k = z_k − z_y and w_k = ∇f_k; q = 2
    for l2 and 1 for linf. Departures: every point is clipped to [0, 1], which the paper ignores; the overshoot applies to every
    point, not to the last only, and a step is 1e-4 longer, both as in the authors' code: else the path ends on the boundary.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    deterministic: ClassVar[bool] = True
    steps: int = setting(50, "linearisations", ge=1, unit="steps")
    overshoot: float = setting(0.02, "part of the perturbation that is added to cross the boundary", ge=0)
    candidates: int = setting(10, "other classes tried, those of largest logits; fewer if there are fewer", ge=1)

    def nearest(self, model: Model, x: Tensor, y: Tensor, norm: str, task: Task, enough: float) -> BestAdversarial:
        """Return the nearest misclassified points of the path, the first of each image."""
        nearest = BestAdversarial(x, norm)
        left = torch.arange(len(x), device=x.device)
        rivals = torch.empty(0)
        total = torch.zeros_like(x)
        for step in range(self.steps + 1):
            x_adv = (x[left] + (1 + self.overshoot) * total).clamp(0, 1)
            with torch.enable_grad():
                x_adv.requires_grad_()
                logits = model(x_adv)
            if step == 0:
                count = min(self.candidates, logits.shape[1] - 1)
                rivals = logits.scatter(1, y[:, None], -torch.inf).topk(count, dim=1).indices
            right = ~nearest.offer(left, x_adv.detach(), task.margin(logits.detach(), y[left]))
            if step == self.steps or not right.any():  # synchronises the device
                break
            total = total + self._to_the_boundary(logits, x_adv, y[left], rivals, norm)
            left, total, rivals = left[right], total[right], rivals[right]
        return nearest

    @staticmethod
    def _to_the_boundary(logits: Tensor, x_adv: Tensor, y: Tensor, rivals: Tensor, norm: str) -> Tensor:
        """Return the shortest step in ``norm`` onto a boundary of the linearised model, (B, C, H, W)."""
        nearest = torch.full((len(y),), torch.inf, device=y.device, dtype=x_adv.dtype)
        step = torch.zeros_like(x_adv)
        for k in range(rivals.shape[1]):
            with torch.enable_grad():
                lead = (logits.gather(1, rivals[:, k, None]) - logits.gather(1, y[:, None]))[:, 0]
                (slope,) = torch.autograd.grad(lead.sum(), x_adv, retain_graph=k + 1 < rivals.shape[1])
            lead = lead.detach().abs().to(x_adv.dtype)
            scale = flat(slope).abs().amax(1).clamp_min(1e-38)  # so that tiny gradients do not vanish when squared
            unit = slope / per_image(scale, slope)
            dual = torch.linalg.vector_norm(flat(unit), ord=1 if norm == "linf" else 2, dim=1)
            distance = torch.where(dual == 0, torch.inf, lead / scale / dual)  # a flat class is out of reach
            direction = sign(unit) if norm == "linf" else unit / per_image(dual, unit)
            closer = (distance < nearest) | distance.isnan()
            along = per_image(distance + _BEYOND, direction) * direction
            step = torch.where(per_image(closer, step), along, step)
            nearest = torch.where(closer, distance, nearest)
        return step
