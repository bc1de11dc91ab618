"""Masks at other radii, and signs of gradient masking that make sense for them, of the first images.

The signs are those of ``evaluation/masking``. There they count images; here they compare shares of right pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from clead.attacks.masks import MaskAPGD
from clead.attacks.runner import finite_images, image_gradient, logits_of, run_attack
from clead.data.loaders import make_generator
from clead.evaluation.correctness import run_microbatched
from clead.evaluation.curve import radii_around
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.state import ResumableResults
from clead.interfaces import Threat
from clead.results.masks import Counts, bootstrap
from clead.results.record import Check, CurvePoint, Estimate
from clead.settings import Ratio
from clead.tasks.segmentation import SEGMENTATION
from clead.threats.linf import Linf

CURVE_STEPS, STEPS, FEWER_STEPS, QUERIES = 20, 100, 50, 100
_IMAGES, _QUICK_IMAGES = 32, 8
_POINT = 0.01  # share of pixels that is not counted as a difference
_FALLEN = 0.1  # share of pixels that may stay right where everything is allowed
_STREAM = 2000  # number of the random stream, past those of the attacks


def mask_curve(plan: EvaluationPlan, store: ResumableResults) -> list[CurvePoint]:
    """Return the share of right pixels at radii around eps, under APGD on the JS divergence."""
    points, settings = [], plan.settings
    n = min(len(plan.images), settings.curve_images or _few(plan))
    attack = MaskAPGD(loss="js_divergence", steps=settings.curve_steps or CURVE_STEPS)
    x, y = _first(plan, n)
    clean = _counts(plan, x, y)
    for number, radius in enumerate(radii_around(plan.threat, settings.curve_points)):
        threat = replace(cast(Any, plan.threat), eps=radius)
        attacked = _counts(plan, _attacked(plan, attack, threat, x, y, number), y)
        lower = attacked.hit.sum(-1) < clean.hit.sum(-1)
        worst = Counts(*(np.where(lower[:, None], a, b) for a, b in zip(attacked, clean, strict=True)))
        value, low, high = bootstrap(worst, "pixel_accuracy", settings.seed)
        robust = Estimate(accuracy=value, low=low, high=high, n=n)
        name = f"{attack.label('')}, {attack.steps} steps"
        points.append(CurvePoint(eps=float(radius), eps_text=radius.text, attack=name, robust=robust))
    return points


def mask_checks(plan: EvaluationPlan, store: ResumableResults) -> list[Check]:
    """Return the checks of gradient masking, in the order of the report."""
    asked = plan.settings.check_images
    n = min(len(plan.images), _few(plan) if asked is None else asked)
    if not n:
        return []
    x, y = _first(plan, n)
    worst = torch.stack([torch.cat([saved["counts"] for saved, _ in plan.parts(store, k)])[:n] for k in _stages(plan)])
    right, pixels = worst[:, :, 0].sum(-1).amin(0).double(), worst[0, :, 2].sum(-1)
    probe = _Probe(plan, x, y, _score(plan, x, y), float((right / pixels.clamp_min(1)).mean()))
    return [check(probe) for check in _CHECKS]


def _stages(plan: EvaluationPlan) -> range:
    return range(-1, len(plan.attacks))


def _few(plan: EvaluationPlan) -> int:
    return _QUICK_IMAGES if plan.suite == "sea-quick" else _IMAGES


def _first(plan: EvaluationPlan, n: int) -> tuple[Tensor, Tensor]:
    x, y = plan.inputs(slice(0, n))
    return x, y.long()


def _attacked(plan: EvaluationPlan, attack: MaskAPGD, threat: Threat, x: Tensor, y: Tensor, number: int) -> Tensor:
    generator = make_generator(plan.device, plan.settings.seed, _STREAM, number)
    return run_microbatched(
        lambda x, y: run_attack(attack, plan.model, x, y, threat, task=plan.task, generator=generator, checked=True),
        x,
        y,
        plan.microbatch,
    )


def _counts(plan: EvaluationPlan, x: Tensor, y: Tensor) -> Counts:
    counts = run_microbatched(lambda x, y: SEGMENTATION.counts(logits_of(plan.model, x), y), x, y, plan.microbatch)
    return Counts(*counts.cpu().movedim(1, 0).numpy())


def _score(plan: EvaluationPlan, x: Tensor, y: Tensor) -> Tensor:
    """Return the share of right pixels of each image, (n,); 0 of an image that is not finite."""
    score = run_microbatched(lambda x, y: plan.task.score(logits_of(plan.model, x), y), x, y, plan.microbatch)
    return score.double() * finite_images(x)


@dataclass
class _Probe:
    """What the checks look at.

    Attributes:
        plan: the evaluation.
        x: the first images, (n, C, H, W), with their masks ``y``.
        clean: share of right pixels of each, (n,).
        worst: mean share of right pixels after all attacks of the suite.
    """

    plan: EvaluationPlan
    x: Tensor
    y: Tensor
    clean: Tensor
    worst: float

    def under(self, threat: Threat, steps: int, number: int) -> float:
        """Return the mean share of right pixels under APGD on the JS divergence, or clean where that is lower."""
        attack = MaskAPGD(loss="js_divergence", steps=steps)
        x_adv = _attacked(self.plan, attack, threat, self.x, self.y, 100 + number)
        return float(torch.minimum(_score(self.plan, x_adv, self.y), self.clean).mean())

    def threat(self, factor: float) -> Threat:
        """Return the threat at eps times ``factor``, or as wide as the norm allows."""
        threat = cast(Any, self.plan.threat)
        return replace(threat, eps=min(float(threat.eps) * factor, threat.largest))


def _deterministic(probe: _Probe) -> Check:
    first, second = (logits_of(probe.plan.model, probe.x[:4]) for _ in range(2))
    passed = torch.equal(first, second)
    explanation = (
        "The model answers the same twice."
        if passed
        else "Two passes of the same images give different logits, so attacks chase noise: switch its randomness off."
    )
    return Check(
        name="deterministic",
        passed=passed,
        numbers={"largest difference": float((first - second).abs().max().nan_to_num())},
        explanation=explanation,
    )


def _logits(probe: _Probe) -> Check:
    logits = logits_of(probe.plan.model, probe.x[:4])
    error = float((logits.sum(1) - 1).abs().max().nan_to_num())
    passed = bool((logits < 0).any()) or error > 1e-3
    explanation = (
        "The outputs are logits."
        if passed
        else "The outputs of each pixel lie in [0, 1] and sum to 1: they are probabilities, whose gradient vanishes where it "
        "is sure; let the model return the values before the softmax."
    )
    return Check(name="logits", passed=passed, numbers={"distance of sums from 1": error}, explanation=explanation)


def _gradients(probe: _Probe) -> Check:
    gradient = run_microbatched(
        lambda x, y: cast(Tensor, image_gradient(probe.plan.model, x)), probe.x, probe.y, probe.plan.microbatch
    )
    finite, zero = finite_images(gradient), (gradient == 0).flatten(1).all(1)
    usable = float((finite & ~zero).double().mean())
    explanation = (
        "The gradient to every image is finite and not zero."
        if usable == 1
        else f"At {1 - usable:.1%} of the images the gradient is zero or not finite, and attacks that follow it find nothing: "
        "look for rounding, argmax or a sign in the model."
    )
    return Check(name="gradients", passed=usable == 1, numbers={"usable": usable}, explanation=explanation)


def _noise(probe: _Probe) -> Check:
    lowest = probe.clean
    generator = make_generator(probe.plan.device, probe.plan.settings.seed, _STREAM, 200)
    for _ in range(10):
        noisy = probe.plan.threat.random_start(probe.x, generator=generator)
        lowest = torch.minimum(lowest, _score(probe.plan, noisy, probe.y))
    return _stronger(
        probe,
        "noise",
        float(lowest.mean()),
        "random noise of the same size, the worst of 10 draws",
        "after the attacks",
    )


def _black_box(probe: _Probe) -> Check:
    best, lowest, threat = probe.x, probe.clean, probe.plan.threat
    generator = make_generator(probe.plan.device, probe.plan.settings.seed, _STREAM, 201)
    n, channels, height, width = probe.x.shape
    for query in range(QUERIES):
        side = max(1, round(min(height, width) * 0.6 * (1 - query / QUERIES)))
        top, left = (
            int(torch.randint(room - side + 1, (), generator=generator, device=best.device)) for room in (height, width)
        )
        block = torch.zeros_like(best)
        signs = torch.randint(2, (n, channels, 1, 1), generator=generator, device=best.device) * 2.0 - 1
        block[:, :, top : top + side, left : left + side] = signs.to(best)
        tried = threat.project(threat.ascend(best, block, 2 * float(threat.eps)), probe.x)
        score = _score(probe.plan, tried, probe.y)
        lower = score < lowest
        best, lowest = torch.where(lower[:, None, None, None], tried, best), torch.minimum(score, lowest)
    what = f"a random search of {QUERIES} queries, without gradients,"
    return _stronger(probe, "black box", float(lowest.mean()), what, "after the attacks with gradients")


def _stronger(probe: _Probe, name: str, value: float, what: str, after: str) -> Check:
    """Return the check that the attacks leave fewer right pixels than something weaker does."""
    passed = value >= probe.worst - _POINT
    head = f"{what[:1].upper()}{what[1:]} leaves {value:.1%} of the pixels right, {probe.worst:.1%} are {after}"
    tail = (
        "as it should be."
        if passed
        else "the gradient misleads the attacks, and the model looks more robust than it is."
    )
    return Check(name=name, passed=passed, numbers={name: value, "attacks": probe.worst}, explanation=f"{head}: {tail}")


def _steps(probe: _Probe) -> Check:
    fewer, more = (probe.under(probe.plan.threat, steps, 0) for steps in (FEWER_STEPS, STEPS))
    passed = min(fewer, probe.worst) - more <= 2 * _POINT
    explanation = (
        f"APGD leaves {fewer:.1%} of the pixels right after {FEWER_STEPS} steps and {more:.1%} after {STEPS}; "
    )
    explanation += (
        "more steps would change little."
        if passed
        else "it has not converged, and a longer search would find more: --eval.steps 1000."
    )
    return Check(
        name="steps",
        passed=passed,
        numbers={f"{FEWER_STEPS} steps": fewer, f"{STEPS} steps": more, "attacks": probe.worst},
        explanation=explanation,
    )


def _unbounded(probe: _Probe) -> Check:
    value = probe.under(Linf(eps=Ratio(1.0)), FEWER_STEPS, 1)  # any image at all, which a ball of another norm is not
    passed = value <= _FALLEN
    explanation = f"Where an attack may change the image at will, {value:.1%} of the pixels stay right: " + (
        "it reaches its end."
        if passed
        else "it should be almost none, so the gradient does not lead to the mistakes there are."
    )
    return Check(name="unbounded", passed=passed, numbers={"unbounded": value}, explanation=explanation)


def _monotone(probe: _Probe) -> Check:
    values = [probe.under(probe.threat(factor), CURVE_STEPS, 2) for factor in (0.5, 1, 2, 4)]
    passed = all(later <= earlier + _POINT for earlier, later in zip(values, values[1:], strict=False))
    shares = ", ".join(f"{value:.1%}" for value in values)
    explanation = f"At eps/2, eps, 2 eps and 4 eps {shares} of the pixels stay right: " + (
        "a larger ball is never harder to attack."
        if passed
        else "a larger ball cannot be harder to attack, so the attack fails."
    )
    numbers = dict(zip(("eps/2", "eps", "2 eps", "4 eps"), values, strict=True))
    return Check(name="monotone", passed=passed, numbers=numbers, explanation=explanation)


_CHECKS: tuple[Callable[[_Probe], Check], ...] = (
    _deterministic,
    _logits,
    _noise,
    _steps,
    _black_box,
    _unbounded,
    _monotone,
    _gradients,
)
