"""The Nesterov iterative fast gradient sign method: the gradient is taken where momentum would carry the image."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Objective, Threat
from clead.settings import setting, settings
from clead.threats.geometry import flat, per_image


@ATTACKS.register("ni_fgsm")
@settings
class NIFGSM:
    """g ← μ·g + ∇J(x + α·μ·g) / ‖·‖₁, x ← x + α·ascent(g), α = eps / steps (Lin et al. 2020, arXiv:1908.06281, eq. 6–8)."""

    targeted: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    steps: int = setting(10, "gradient steps", ge=1, unit="steps")
    decay: float = setting(1.0, "μ: part of the collected direction that a step keeps", ge=0)

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], inside the threat set around ``x``."""
        step_size = threat.eps / self.steps
        x_adv, direction = x, torch.zeros_like(x)
        for _ in range(self.steps):
            ahead = x_adv + step_size * self.decay * direction
            _, gradient = value_and_gradient(objective, ahead)
            length = flat(gradient).abs().sum(1).clamp_min(1e-12)
            direction = self.decay * direction + gradient / per_image(length, gradient)
            x_adv = threat.project(threat.ascend(x_adv, direction, step_size), x)
        return x_adv
