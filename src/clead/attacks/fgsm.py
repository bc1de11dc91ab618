"""The fast gradient sign method, with or without a random start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

    random_start: bool = setting(False, "start from a random point of the ball instead of the image itself")
    step_size: Ratio = setting(
        Ratio("1"), "length of the step", unit="multiples of eps; 1.25 with random start in Wong 2020", gt=0
    )

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], after one projected step."""
        start = threat.random_start(x, generator=generator) if self.random_start else x
        _, gradient = value_and_gradient(objective, start)
        return threat.project(threat.ascend(start, gradient, float(self.step_size) * threat.eps), x)


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    random_start: bool = False,
    step_size: float | str | None = None,
    objective: str = "cross_entropy",
    seed: int = 0,
) -> Tensor:
    """Attack ``model`` by one gradient step (Goodfellow et al. 2015, arXiv:1412.6572).

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``.
        norm: linf, l2 or l1.
        random_start: start from a random point of the ball (Wong et al. 2020, arXiv:2001.03994).
        step_size: multiples of eps; 1, or 1.25 with a random start.
        objective: cross_entropy, margin, dlr, kl, embedding or contrastive.
        seed: of the random start.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]. Raises UserError on pixels outside [0, 1], NaN, wrong labels or an eps of the wrong scale.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> (fgsm(model, x, torch.tensor([0]), eps=0.1) - x).abs().max()
    tensor(0.1000)
    """
    from clead.attacks.runner import call

    length = step_size if step_size is not None else (1.25 if random_start else 1.0)
    values = {"random_start": random_start, "step_size": length}
    return call(FGSM, values, model, x, y, norm=norm, eps=eps, seed=seed, objective=objective)
