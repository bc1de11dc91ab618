"""Projected gradient ascent, the inner maximisation of adversarial training and the plainest strong attack."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.capabilities import times
from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Objective, Threat
from clead.settings import Ratio, setting, settings
from clead.threats.geometry import per_image


@ATTACKS.register("pgd")
@settings
class PGD:
    """Maximise the objective by projected gradient ascent (Madry et al. 2018, arXiv:1706.06083, eq. 2.1 and section 5).

    Steps whose size falls are ours: where a model has learnt to hide its gradient from steps of one size, as small networks do on
    MNIST at eps 0.3, they find what constant ones miss (docs/method.md, "Step sizes").
    """

    targeted: ClassVar[bool] = True
    steps: int = setting(10, "gradient steps", ge=1, unit="steps")
    step_size: Ratio | None = setting(
        None,
        "length of a step, with falling steps of the first; none: 2.5 · eps / steps (Madry 2018), falling eps; for l0 eps, which "
        "leaves choosing pixels to the projection",
        unit="pixels in [0, 1], in the threat's norm",
        gt=0,
    )
    step_schedule: Literal["constant", "linear"] = setting(
        "constant", "steps of one size, or falling linearly: step t of n, from 0, is step_size · (1 - t / n)"
    )
    restarts: int = setting(1, "independent starts; the best point per image is kept", ge=1, unit="starts")
    random_start: bool = setting(True, "start from a random point of the ball instead of the image itself")
    keep: Literal["last", "best"] = setting(
        "last", "which point of the path to return: the last, or the one of largest objective"
    )

    def label(self, objective: str) -> str:
        """Return the name that tables show."""
        return f"PGD-{self.steps}{times(self.restarts)} {objective}"

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], inside the threat set around ``x``."""
        falling = self.step_schedule == "linear"
        default = threat.eps if falling or threat.norm == "l0" else 2.5 * threat.eps / self.steps
        step_size = default if self.step_size is None else float(self.step_size)
        track = self.keep == "best" or self.restarts > 1
        best, best_value = x, torch.full((len(x),), -torch.inf, device=x.device)
        for _restart in range(self.restarts):
            x_adv = threat.random_start(x, generator=generator) if self.random_start else x
            for step in range(self.steps):
                value, gradient = value_and_gradient(objective, x_adv)
                if self.keep == "best":
                    best, best_value = _better(x_adv, value, best, best_value)
                length = step_size * (1 - step / self.steps) if falling else step_size
                x_adv = threat.project(threat.ascend(x_adv, gradient, length), x)
            if not track:
                return x_adv
            with torch.no_grad():
                best, best_value = _better(x_adv, objective(x_adv), best, best_value)
        return best


def _better(x_adv: Tensor, value: Tensor, best: Tensor, best_value: Tensor) -> tuple[Tensor, Tensor]:
    # NaN counts as best: hidden behind an earlier point, a model whose gradient is broken would look robust.
    better = (value > best_value) | value.isnan()
    return torch.where(per_image(better, x_adv), x_adv, best), torch.where(better, value, best_value)
