"""How many images the curve and the checks of gradient masking look at, so that they cost no more than half of the attacks.

Counted in passes of an image through the model, which are the same on every machine and in every repetition; time is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clead.evaluation import masking
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.state import State
from clead.models.split import has_features

CURVE_IMAGES, CURVE_STEPS, CHECK_IMAGES = 256, 20, 128
_QUICK_STEPS = 10
_CURVE_SHARE, _CHECK_SHARE = 0.13, 0.34  # of the passes of the attacks, in suite quick
_FEWEST = 4  # fewer images than that show nothing


@dataclass(frozen=True)
class Extent:
    """Images and steps of what follows the attacks, and what a record says of them if the suite has limited them."""

    curve_images: int
    curve_steps: int
    check_images: int
    notes: tuple[str, ...] = ()


def extent(plan: EvaluationPlan, store: State, radii: int, *, source: bool) -> Extent:
    """Return what the settings say; what they leave open is limited in suite quick by what the attacks have cost.

    Args:
        plan: the evaluation; the parts of all its attacks are in ``store``.
        store: of finished parts.
        radii: number of radii of the curve.
        source: whether the checks try a second model's images.
    """
    settings, n = plan.settings, len(plan.images)
    curve = min(n, settings.curve_images or CURVE_IMAGES)
    checks = min(n, CHECK_IMAGES if settings.check_images is None else settings.check_images)
    steps = settings.curve_steps or CURVE_STEPS
    if plan.suite != "quick":
        return Extent(curve, steps, checks)
    notes = []
    passes = _passes(plan, store)
    clean = torch.cat([store.parts[plan.key(batch, -1)][0]["flags"] for batch in range(plan.batches)])
    if settings.curve_images is None and radii:
        steps = settings.curve_steps or min(steps, _QUICK_STEPS)
        curve = _affordable(clean[:curve], 0, radii * (2 * steps + 3), _CURVE_SHARE * passes)
        notes.append(f"the curve is of the first {curve} images and PGD-{steps}: --eval.curve_images 256 takes more")
    if settings.check_images is None:
        cost = masking.cost(embedding=has_features(plan.model), source=source)
        checks = _affordable(clean[:checks], *cost, _CHECK_SHARE * passes)
        if checks < _FEWEST:
            checks = 0
            notes.append(
                "too few images were attacked for checks of gradient masking: --eval.check_images 128 makes them"
            )
        else:
            notes.append(f"the checks are of the first {checks} images: --eval.check_images 128 takes more")
    return Extent(curve, steps, checks, tuple(f"suite quick: {note}" for note in notes))


def _passes(plan: EvaluationPlan, store: State) -> int:
    """Return the passes of the clean images and of all attacks, forward and backward."""
    parts = [
        store.parts[plan.key(batch, stage)][1] for batch in range(plan.batches) for stage in range(len(plan.attacks))
    ]
    return len(plan.images) + sum(part["forwards"] + part["backwards"] for part in parts)


def _affordable(clean: Tensor, each: float, right: float, budget: float) -> int:
    """Return how many of the first images cost at most ``budget``: ``each``, and ``right`` more where it is right when clean."""
    spent = (each + right * clean.double()).cumsum(0)
    return int((spent <= budget).sum())


def expected_parts(plan: EvaluationPlan, attacks: float, radii: int) -> tuple[float, float]:
    """Return what curve and checks will take at most, as parts of ``attacks``, the passes of attacks that break nothing."""
    settings, n = plan.settings, len(plan.images)
    each, right = masking.cost(embedding=has_features(plan.model), source=False)
    curve = radii * min(n, settings.curve_images or CURVE_IMAGES) * (2 * (settings.curve_steps or CURVE_STEPS) + 3)
    checks = min(n, CHECK_IMAGES if settings.check_images is None else settings.check_images) * (each + right)
    parts = curve / attacks, checks / attacks
    if plan.suite == "quick":
        shares = (settings.curve_images is None, _CURVE_SHARE), (settings.check_images is None, _CHECK_SHARE)
        parts = tuple(min(part, share) if free else part for part, (free, share) in zip(parts, shares, strict=True))
    return parts[0], parts[1]
