"""The fast minimum-norm attack: a ball that shrinks while the point in it is adversarial, and grows while it is not."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.best_adversarial import BestAdversarial, NearestSearch
from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Model
from clead.settings import setting, settings
from clead.tasks import Task
from clead.threats import THREATS
from clead.threats.geometry import box_slack, flat, per_image, sign

_LAST_GAMMA = 1e-3
_HALVINGS = 40
_DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


@ATTACKS.register("fmn")
@settings
class FMN(NearestSearch):
    """δ ← Π(δ + α·∇L/‖∇L‖₂) into the ball of radius ε; ε ← ε·(1 − γ) at an adversarial point and ε·(1 + γ) at another.

    Source: Pintor et al. 2021, arXiv:2102.12827, algorithm 1; L = max_{k≠y} z_k − z_y. Until a first adversarial point is
    found, ε is the estimated distance to the boundary, ‖δ‖_p + |L| / ‖∇L‖_q; for l0 ε moves by a pixel at least. The step α
    falls by a cosine to a hundredth, γ to 0.001.

    Departures: the projection is that onto ball ∩ box, and the estimate leaves out the gradient of pixels at the box's
    border. In the paper the box comes after the ball and takes away from a perturbation of the right size: images with many
    black and white pixels are often not broken at all. The estimate is taken times 1 + γ, because the path to a flat boundary
    would end just before it. l0 counts pixels, whatever their channels, as the threat does.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    targeted: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    steps: int = setting(100, "gradient steps", ge=1, unit="steps")
    step_size: float = setting(1.0, "length of the first step", unit="Euclidean length over pixels in [0, 1]", gt=0)
    gamma: float = setting(0.05, "part by which the ball shrinks or grows in the first step", gt=_LAST_GAMMA, lt=1)

    def nearest(self, model: Model, x: Tensor, y: Tensor, norm: str, task: Task, enough: float) -> BestAdversarial:
        """Return the nearest misclassified points of the path."""
        nearest = BestAdversarial(x, norm)
        measure = THREATS.get(norm)(eps=0).distance
        farthest = measure(torch.maximum(x, 1 - x))
        delta = torch.zeros_like(x)
        radius = torch.ones_like(nearest.sizes) if norm == "l0" else torch.full_like(nearest.sizes, torch.inf)
        for step in range(self.steps):
            left = nearest.left(enough)
            if not len(left):
                break
            falling = (1 + math.cos(math.pi * step / self.steps)) / 2
            length = self.step_size * (0.01 + 0.99 * falling)
            gamma = _LAST_GAMMA + (self.gamma - _LAST_GAMMA) * falling

            x_left, y_left, delta_left = x[left], y[left], delta[left]
            x_adv = (x_left + delta_left).clamp(0, 1)  # it is there already, up to rounding
            value, gradient = value_and_gradient(lambda z, y=y_left: task.margin(model(z), y), x_adv)
            wrong = nearest.offer(left, x_adv, value)
            best = nearest.sizes[left]
            # Scaling by the largest entry first keeps tiny gradients from vanishing when squared.
            scale = flat(gradient).abs().amax(1).clamp_min(1e-38)
            unit = gradient / per_image(scale, gradient)
            if norm == "l0":
                shrunk = torch.minimum(radius[left] - 1, (radius[left] * (1 - gamma)).floor())
                grown = torch.maximum(radius[left] + 1, (radius[left] * (1 + gamma)).floor())
                now = torch.where(wrong, torch.minimum(shrunk, best), grown).clamp_min(1)
            else:
                useful = torch.where((box_slack(x_adv, unit) > 0) | unit.isnan(), unit, 0)
                slope = torch.linalg.vector_norm(flat(useful), ord=_DUAL[norm], dim=1).clamp_min(1e-12) * scale
                ahead = (measure(delta_left) + value.abs().to(x.dtype) / slope) * (1 + gamma)
                outside = torch.where(best.isinf(), ahead, radius[left] * (1 + gamma))
                now = torch.where(wrong, torch.minimum(radius[left] * (1 - gamma), best), outside)
            radius[left] = torch.minimum(now, farthest[left])
            ascent = unit / per_image(torch.linalg.vector_norm(flat(unit), dim=1).clamp_min(1e-12), unit)
            delta[left] = _project(x_left, delta_left + length * ascent, radius[left], norm)
        return nearest


def _project(x: Tensor, delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Return the Euclidean-nearest perturbation to ``delta``, (B, C, H, W), in ball ∩ box, a radius of its own per image, (B,).

    As the threats' projections, which have one radius for all images; the multiplier is found by bisection here.
    """
    cap, magnitude = flat(box_slack(x, delta)), flat(delta).abs()
    if norm == "l0":
        capped = torch.minimum(magnitude, cap)
        saved = (capped * (2 * magnitude - capped)).view_as(delta).sum(1).flatten(1)
        rank = saved.argsort(1, descending=True).argsort(1)
        mask = (rank < radius[:, None]).view(len(delta), 1, *delta.shape[2:])
        return capped.view_as(delta) * sign(delta) * mask
    largest = magnitude.amax(1, keepdim=True)

    def shrunk(middle: Tensor) -> Tensor:
        less = magnitude - middle * largest if norm == "l1" else magnitude * (1 - middle)
        return torch.minimum(less.clamp_min(0), cap)

    if norm == "linf":
        return torch.minimum(torch.minimum(magnitude, radius[:, None]), cap).view_as(delta) * sign(delta)
    low, high = torch.zeros_like(largest), torch.ones_like(largest)
    for step in range(_HALVINGS):
        middle = (low + high) / 2 if step else low
        over = (
            torch.linalg.vector_norm(shrunk(middle), ord=2 if norm == "l2" else 1, dim=1, keepdim=True)
            > radius[:, None]
        )
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return shrunk(high).view_as(delta) * sign(delta)
