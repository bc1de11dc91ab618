"""The momentum iterative fast gradient sign method: gradient ascent that remembers its direction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Objective, Threat
from clead.settings import Ratio, setting, settings
from clead.threats.geometry import flat, per_image


@ATTACKS.register("mi_fgsm")
@settings
class MIFGSM:
    """g ← μ·g + ∇J / ‖∇J‖₁, x ← x + α·ascent(g) (Dong et al. 2018, arXiv:1710.06081, algorithm 1 and eq. 9).

    The paper clips nothing, because α = eps / steps cannot leave the ball; here every point is projected into ball ∩ box.
    """

    targeted: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    steps: int = setting(10, "gradient steps", ge=1, unit="steps")
    step_size: Ratio | None = setting(
        None, "length of a step; none: eps / steps (Dong 2018)", unit="pixels in [0, 1], in the threat's norm", gt=0
    )
    decay: float = setting(1.0, "part of the collected direction that a step keeps; 0: no momentum", ge=0)

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], the last point of the path; nothing here is random."""
        step_size = threat.eps / self.steps if self.step_size is None else float(self.step_size)
        x_adv, direction = x, torch.zeros_like(x)
        for _ in range(self.steps):
            _, gradient = value_and_gradient(objective, x_adv)
            # Scaling by the largest entry first keeps tiny gradients (saturated logits) from vanishing in the sum.
            gradient = gradient / per_image(flat(gradient).abs().amax(1).clamp_min(1e-38), gradient)
            length = flat(gradient).abs().sum(1).clamp_min(1e-12)
            direction = self.decay * direction + gradient / per_image(length, gradient)
            x_adv = threat.project(threat.ascend(x_adv, direction, step_size), x)
        return x_adv
