"""What the checks of gradient masking share: the model, its clean answers, and what attacks have left standing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from clead.attacks import OBJECTIVES
from clead.attacks.pgd import PGD
from clead.interfaces import Objective, Threat
from clead.losses.precision import at_least_float32
from clead.results.record import Check
from clead.settings import Ratio
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import flat, per_image


def few(n: int) -> float:
    """Return how many of n images may differ by chance: 3, or 5 % where that is more.

    >>> few(20), few(200)
    (3, 10.0)
    """
    return max(3, 0.05 * n)


class GivenMode(NamedTuple):
    """Layers that came in train mode, by class, and the logits in the mode that the model came in, if there are any."""

    training: list[str]
    logits: Tensor | None


class Probe:
    """The model in eval mode, its clean answers, and what the attacks that several checks share have left standing.

    ``x`` and ``y`` are all n images; the attacks are on those in ``right``, the m that are classified right when clean.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        source: nn.Module | None,
        given: GivenMode,
        standing: Tensor | None,
    ) -> None:
        self.model, self.x, self.y, self.threat, self.seed, self.source = model, x, y, threat, seed, source
        self.given = given
        self.generator = torch.Generator(x.device).manual_seed(seed)
        self.logits = at_least_float32(model(x))
        self.flags = CLASSIFICATION.correct(self.logits, y)
        self.right = self.flags.nonzero()[:, 0]
        self.m = len(self.right)
        self.earlier = None if standing is None else standing[self.right]
        self.lost = 0  # images on which an attack met a gradient that is not finite
        self.standing: dict[str, Tensor] = {}

    def objective(self, name: str, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
        """Return the objective called ``name`` of these images and labels."""
        objective: Objective = OBJECTIVES.get(name)(model, x, y)
        # A model that cuts the graph has the gradient 0, which is for a check to say, not for autograd to refuse.
        return lambda x_adv: objective(x_adv) + 0 * flat(x_adv).sum(1)

    def held(
        self,
        name: str,
        steps: int,
        *,
        threat: Threat | None = None,
        among: Tensor | None = None,
        random_start: bool = True,
        source: nn.Module | None = None,
    ) -> Tensor:
        """Return which of ``among`` (m,) PGD leaves right, (m,); its images are made on ``source``, else on the model."""
        left = torch.ones(self.m, dtype=torch.bool, device=self.x.device) if among is None else among.clone()
        chosen = self.right[left]
        if len(chosen):
            x, y = self.x[chosen], self.y[chosen]
            threat = threat or self.threat
            # L0 is not convex: steps that shrink as they grow in number would never change which pixels are moved.
            step_size = Ratio(threat.eps) if threat.norm == "l0" and threat.eps else None
            attack = PGD(steps=steps, step_size=step_size, keep="best", random_start=random_start)
            objective = self.objective(name, source or self.model, x, y)
            x_adv = attack(objective, x, threat, generator=self.generator)
            finite = torch.isfinite(flat(x_adv)).all(1)
            self.lost += int((~finite).sum())
            left[left.clone()] = CLASSIFICATION.correct(self.model(torch.where(per_image(finite, x), x_adv, x)), y)
        return left

    def pgd(self, name: str, steps: int = 50) -> Tensor:
        """Return which right images stand after PGD inside the threat, (m,), computed once."""
        key = f"{name}-{steps}"
        if key not in self.standing:
            self.standing[key] = self.held(name, steps)
        return self.standing[key]

    def white_box(self) -> Tensor:
        """Return which right images stand after PGD-50 on the cross-entropy and on the margin, (m,)."""
        return self.pgd("cross_entropy") & self.pgd("margin")

    def long(self) -> Tensor:
        """Return which of those stand after PGD-200 from another start too, (m,)."""
        if "long" not in self.standing:
            self.standing["long"] = self.held("margin", 200, among=self.white_box())
        return self.standing["long"]


def check(name: str, passed: bool, seen: str, good: str, bad: str, **numbers: float | Tensor) -> Check:
    """Return a check with its explanation: what was ``seen``, and what that means, ``good`` or ``bad``."""
    values = {key: float(value) for key, value in numbers.items()}
    return Check(name=name, passed=bool(passed), numbers=values, explanation=f"{seen}. {good if passed else bad}.")


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest difference of logits per image, (B,), relative to the largest logit of all; 1 for NaN."""
    a, b = at_least_float32(a), at_least_float32(b)
    return ((a - b).abs().amax(1) / b.abs().max().clamp_min(1e-30)).nan_to_num(1.0, 1.0, 1.0)
