"""The momentum iterative fast gradient sign method: gradient ascent that remembers its direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


def mi_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | str | None = None,
    decay: float = 1.0,
    objective: str = "cross_entropy",
) -> Tensor:
    """Attack ``model`` by gradient ascent with momentum (Dong et al. 2018, arXiv:1710.06081); its images transfer well.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: linf, l2, l1 or l0.
        steps: gradient steps.
        step_size: in pixel units; None: eps / steps.
        decay: part of the collected direction that a step keeps.
        objective: cross_entropy, margin, dlr, kl, embedding or contrastive.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]. Raises UserError on pixels outside [0, 1], NaN, wrong labels or an eps of the wrong scale.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> (mi_fgsm(model, x, torch.tensor([0]), eps=0.1) - x).abs().max()
    tensor(0.1000)
    """
    from clead.attacks.runner import call

    values = {"steps": steps, "step_size": step_size, "decay": decay}
    return call(MIFGSM, values, model, x, y, norm=norm, eps=eps, seed=0, objective=objective)
