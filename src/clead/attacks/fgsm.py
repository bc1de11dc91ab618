"""The fast gradient sign method, with or without a random start."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Objective, Threat
from clead.settings import Ratio, setting, settings


@ATTACKS.register("fgsm")
@settings
class FGSM:
    """One ascent step: x + eps · sign ∇J(x) (Goodfellow et al. 2015, arXiv:1412.6572, section 4), in the geometry of the threat.

    With a random start, step_size = 1.25 is FGSM-RS of fast adversarial training (Wong et al. 2020, arXiv:2001.03994, algorithm 3).
    """

    targeted: ClassVar[bool] = True
    random_start: bool = setting(False, "start from a random point of the ball instead of the image itself")
    step_size: Ratio = setting(
        Ratio("1"), "length of the step", unit="multiples of eps; 1.25 with random start in Wong 2020", gt=0
    )

    def label(self, objective: str) -> str:
        """Return the name that tables show."""
        return "FGSM" if objective == "CE" else f"FGSM {objective}"

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], after one projected step."""
        start = threat.random_start(x, generator=generator) if self.random_start else x
        _, gradient = value_and_gradient(objective, start)
        return threat.project(threat.ascend(start, gradient, float(self.step_size) * threat.eps), x)
