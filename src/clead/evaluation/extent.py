"""How much the curve and the checks of gradient masking do, so that in suite quick they cost no more than half of the attacks.

Counted in passes of an image through the model and in calls of the model, which are the same on every machine and in every
repetition; time is not. A call takes some time for itself and some for each of its images: what takes at most half of the calls
and half of the passes takes about half of the time, whatever these two are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clead.evaluation import masking
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.state import ResumableResults
from clead.models.split import has_features

CURVE_POINTS, CURVE_IMAGES, CURVE_STEPS, CHECK_IMAGES = 6, 256, 20, 128
_QUICK_CURVES = ((6, 10), (6, 5), (4, 5), (2, 5))  # points and steps, the first that fits
_CURVE_SHARE, _CHECK_SHARE = 0.2, 0.27  # of the passes, and of the calls, of the attacks in suite quick
_FEWEST, _ENOUGH = 4, 16  # fewer images than 4 show nothing; with fewer than 16 it is better to make fewer checks


@dataclass(frozen=True)
class Extent:
    """Images, points and steps of what follows the attacks, and what a record says of them if the suite has limited them."""

    curve_points: int
    curve_images: int
    curve_steps: int
    check_images: int
    checks: masking.Effort
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """What the settings say of curve and checks; None where suite quick is free to choose.

    Configurations of earlier versions name the defaults of their time, so in suite quick these count as not given.
    """

    points: int | None
    images: int | None
    steps: int | None
    checked: int | None

    @staticmethod
    def of(plan: EvaluationPlan) -> _Asked:
        settings = plan.settings
        values = settings.curve_points, settings.curve_images, settings.curve_steps, settings.check_images
        defaults = CURVE_POINTS, CURVE_IMAGES, CURVE_STEPS, CHECK_IMAGES
        return _Asked(*(None if value == usual else value for value, usual in zip(values, defaults, strict=True)))


def extent(plan: EvaluationPlan, store: ResumableResults) -> Extent:
    """Return what the settings say; what they leave open is limited in suite quick by what the attacks have cost.

    Args:
        plan: the evaluation; the parts of all its attacks are in ``store``.
        store: of finished parts.
    """
    asked, n = _Asked.of(plan), len(plan.images)
    points = CURVE_POINTS if asked.points is None else asked.points
    curve = min(n, asked.images or CURVE_IMAGES)
    checks = min(n, CHECK_IMAGES if asked.checked is None else asked.checked)
    steps = asked.steps or CURVE_STEPS
    efforts = masking.efforts(embedding=has_features(plan.model), source=plan.source is not None)
    if plan.suite != "quick":
        return Extent(points, curve, steps, checks, efforts[0])
    notes = []
    spent = _spent(plan, store)
    clean = plan.flags(store, -1)
    if asked.images is None and points:
        points, steps, curve = _curve(plan, asked, clean[:curve], spent)
        radii_text = f" at {points} radii" if points != CURVE_POINTS and asked.points is None else ""
        notes.append(
            f"the curve is of the first {curve} images and PGD-{steps}{radii_text}: --eval.curve_images 200 takes more"
            if curve
            else "the attacks were too short for a curve: --eval.curve_images 200 makes one"
        )
    effort = efforts[0]
    if asked.checked is None:
        effort, checks = _checks(efforts, clean[:checks], spent)
        notes.append(_words(effort, checks, efforts[0]))
    return Extent(points, curve, steps, checks, effort, tuple(f"suite quick: {note}" for note in notes))


def _spent(plan: EvaluationPlan, store: ResumableResults) -> tuple[int, int]:
    """Return the passes and the calls of the clean images and of all attacks, forward and backward."""
    parts = [data for stage in range(len(plan.attacks)) for _, data in plan.parts(store, stage)]
    passes = sum(data["forwards"] + data["backwards"] for data in parts)
    return len(plan.images) + passes, plan.batches + sum(data["calls"] for data in parts)


def _curve(plan: EvaluationPlan, asked: _Asked, clean: Tensor, spent: tuple[int, int]) -> tuple[int, int, int]:
    """Return points, steps and images of a curve that is within its share."""
    passes, calls = (_CURVE_SHARE * value for value in spent)
    for points, steps in _QUICK_CURVES:
        points = points if asked.points is None else asked.points
        steps = asked.steps or steps
        images = min(_affordable(clean, 0, points * (2 * steps + 3), passes), len(clean))
        batches = -(-images // plan.batch_size)
        while batches and batches * points * (2 * steps + 3) > calls:
            batches -= 1
        images = min(images, batches * plan.batch_size)
        if images >= min(_ENOUGH, len(clean)):
            break
    return points, steps, images


def _checks(efforts: list[masking.Effort], clean: Tensor, spent: tuple[int, int]) -> tuple[masking.Effort, int]:
    """Return the most checks that are within their share, and on how many images; 0 images if none are."""
    passes, calls = (_CHECK_SHARE * value for value in spent)
    for effort in efforts:
        images = _affordable(clean, effort.each, effort.right, passes) if effort.calls <= calls else 0
        if images >= min(_ENOUGH, len(clean)):
            break
    return effort, images if images >= _FEWEST else 0


def _words(effort: masking.Effort, images: int, whole: masking.Effort) -> str:
    """Return which checks are made of how many images, and how to have them all."""
    if not images:
        return "the attacks were too short for checks of gradient masking: --eval.check_images 100 makes them"
    without = [name for name in whole.names if name not in effort.names]
    less = f", without {', '.join(without)}" if without else ""
    return f"the checks are of the first {images} images{less}: --eval.check_images 100 makes all"


def _affordable(clean: Tensor, each: float, right: float, budget: float) -> int:
    """Return how many of the first images cost at most ``budget``: ``each``, and ``right`` more where it is right when clean."""
    spent = (each + right * clean.double()).cumsum(0)
    return int((spent <= budget).sum())


def expected_parts(plan: EvaluationPlan, attacks: float, radii: int) -> tuple[float, float]:
    """Return what curve and checks will take at most, as parts of ``attacks``, the passes of attacks that break nothing."""
    asked, n = _Asked.of(plan), len(plan.images)
    effort = masking.efforts(embedding=has_features(plan.model), source=False)[0]
    curve = radii * min(n, asked.images or CURVE_IMAGES) * (2 * (asked.steps or CURVE_STEPS) + 3)
    checks = min(n, CHECK_IMAGES if asked.checked is None else asked.checked) * (effort.each + effort.right)
    parts = curve / attacks, checks / attacks
    if plan.suite == "quick":
        shares = (asked.images is None, _CURVE_SHARE), (asked.checked is None, _CHECK_SHARE)
        parts = tuple(min(count, share) if free else count for count, (free, share) in zip(parts, shares, strict=True))
    return parts[0], parts[1]
