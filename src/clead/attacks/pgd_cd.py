"""PGD of many steps of one size, which leaves an image where its path begins to repeat itself."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.capabilities import SHORT, times
from clead.interfaces import Model, Threat
from clead.losses.precision import at_least_float32
from clead.settings import Ratio, setting, settings
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION

_SHORTEST = 8  # steps for which a point is remembered


@ATTACKS.register("pgd_cd")
@settings
class PGDCD:
    """Signed steps of one size, clipped to ball and box, until an image is misclassified, its path repeats itself, or steps end.

    Source: PGD with cycle detection (Doldo et al. 2025, arXiv:2503.19347). In L∞ a point decides the whole path after it, so a path
    that comes back to a point, to the last bit, visits no other points from there on: it cannot break the image, and leaving out
    the remaining steps changes no verdict. It holds for models that answer the same for the same image; for a randomised one set
    ``detect`` to false. Rounding of a model may depend on how many images it is given at once, and so may the path.

    Departure: the authors keep a hash of every point; here one point per image is remembered exactly, another one after a quarter
    of the steps so far, so no two points are ever taken for one another, and a cycle is found a little later.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    targeted: ClassVar[bool] = True
    returns_clean: ClassVar[bool] = True
    steps: int = setting(1000, "most gradient steps of each run", ge=1, unit="steps")
    step_size: Ratio = setting(Ratio("1/4"), "length of a step", unit="multiples of eps", gt=0)
    restarts: int = setting(
        1, "runs, the first from the image itself, the others from random points", ge=1, unit="runs"
    )
    loss: Literal["cross_entropy", "margin"] = setting("cross_entropy", "what is maximised")
    detect: bool = setting(
        True, "leave an image where its path repeats itself; false: all steps, with the same verdicts"
    )

    def label(self, objective: str) -> str:
        """Return the name that tables show."""
        return f"PGD-{self.steps} {SHORT.get(self.loss, self.loss)}{times(self.restarts)}"

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
        """Return misclassified images of the threat set, (B, C, H, W), and ``x`` itself where none was found."""
        x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
        if not threat.eps:
            return x_adv
        for restart in range(self.restarts):
            point = threat.random_start(x, generator=generator) if restart else x
            left = self._climb(model, x, y, point, left, threat, task, x_adv)
        return x_adv

    def _climb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        point: Tensor,
        left: Tensor,
        threat: Threat,
        task: Task,
        x_adv: Tensor,
    ) -> Tensor:
        """Climb once from ``point`` for the images ``left``, put what breaks the model into ``x_adv``; return which stand."""
        climbing, stand, point = left, [], point[left]
        remembered, until = point, _SHORTEST
        for step in range(self.steps + 1):
            if not len(climbing):
                break
            with torch.enable_grad():
                leaf = point.detach().requires_grad_()
                logits = at_least_float32(model(leaf.clone()))
                value = (task.loss if self.loss == "cross_entropy" else task.margin)(logits, y[climbing])
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            wrong = ~task.correct(logits.detach(), y[climbing])
            repeats = (point == remembered).flatten(1).all(1) if self.detect and step else torch.zeros_like(wrong)
            x_adv[climbing[wrong]] = point[wrong]
            stand.append(climbing[repeats & ~wrong])
            on = (~wrong & ~repeats).nonzero()[:, 0]  # synchronises the device
            climbing, remembered, point, gradient = (each[on] for each in (climbing, remembered, point, gradient))
            if step == until:
                remembered, until = point, step + max(_SHORTEST, step // 4)
            origin = x[climbing]
            point = threat.project(threat.ascend(point, gradient, float(self.step_size) * threat.eps), origin)
        return torch.cat([*stand, climbing]).sort().values
