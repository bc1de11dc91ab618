"""Signs of gradient masking: does a model look robust because the attacks on it fail?

The list is that of Athalye et al. 2018, arXiv:1802.00420, section 3.1, and Carlini et al. 2019, arXiv:1902.06705, sections 3 to 5,
with the mistakes of preparation that pass for robustness. A check compares counts of the same few images, so it allows ``few(n)``
of them: a healthy model passes on a hundred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from clead.attacks import ATTACKS, OBJECTIVES
from clead.attacks.gradient import value_and_gradient
from clead.attacks.pgd import PGD
from clead.attacks.runner import check_inputs, logits_of
from clead.interfaces import Objective, Threat
from clead.losses.precision import at_least_float32
from clead.models.external import ModelError
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.models.split import has_features, wrapped
from clead.progress import Tick
from clead.results.record import Check
from clead.results.statistics import mcnemar
from clead.settings import Ratio
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import box_slack, flat, per_image
from clead.threats.linf import Linf

_QUERIES, _FEWER_QUERIES = 500, 100
_BOX_STEPS, _FEWER_BOX_STEPS = 50, 15
_PLAIN = ("mode", "deterministic", "batch", "logits", "normalisation", "smooth", "gradients")  # attack nothing
_PLAIN_PASSES = 32
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "MNIST": ((0.1307,), (0.3081,)),
}


def few(n: int) -> float:
    """Return how many of n images may differ by chance: 3, or 5 % where that is more.

    >>> few(20), few(200)
    (3, 10.0)
    """
    return max(3, 0.05 * n)


@dataclass(frozen=True)
class Selection:
    """Which checks to make.

    Attributes:
        names: of the checks.
        standing: (n,) bool, which images earlier attacks inside the threat left right. The checks noise and black box then take
            these for what gradients find, instead of attacking themselves, and black box and unbounded are shorter.
    """

    names: Collection[str]
    standing: Tensor | None = None


class _GivenMode(NamedTuple):
    """Layers that came in train mode, by class, and the logits in the mode that the model came in, if there are any."""

    training: list[str]
    logits: Tensor | None


def run_checks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    seed: int = 0,
    source: nn.Module | None = None,
    tick: Tick | None = None,
    selection: Selection | None = None,
) -> list[Check]:
    """Look for signs that attacks on ``model`` fail for another reason than its robustness.

    Costs at most about 550 gradients and 550 answers per image that is classified right when clean (in passes, some
    14 runs of PGD-50), less the more images break.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); as the user hands it over, also in train mode. Its parameters,
            buffers, modes and gradients, and the global random states, are left bit-identical.
        x: (n, C, H, W) float in [0, 1], about a hundred images, also misclassified ones.
        y: (n,) int64 in [0, K).
        threat: norm and radius that robustness is claimed for.
        seed: of all the randomness.
        source: a second model of the same classes, whose adversarial images are tried on ``model``.
        tick: advanced by 1 after each check, as often as there are checks to make.
        selection: of the checks; None: all.

    Returns:
        The checks in the order of ``CHECKS``, without "black box" where there is neither a black-box attack for this norm nor a
        source. Raises UserError on wrong images, labels or logits.
    """
    check_inputs(x, y)
    selection = selection or Selection(CHECKS)
    model, source = wrapped(model), None if source is None else wrapped(source)
    checks: list[Check] = []
    models = [model] if source is None else [model, source]
    with torch.inference_mode(False), torch.no_grad(), _restored(models), fork_rng(seed):
        x, y = (part.clone() if part.is_inference() else part.detach() for part in (x, y))
        logits_of(model, x[:1])  # raises the errors for users
        training = [type(part).__name__ for part in model.modules() if part.training]
        with _restored([model]), fork_rng(seed):  # batch-norm in train mode changes its statistics
            given = _GivenMode(training, _in_given_mode(model, x) if training else None)
        with attack_mode(model), attack_mode(source) if source is not None else nullcontext():
            probe = _Probe(model, x, y, threat, seed, source, given, selection.standing)
            for name, check in _CHECKS.items():
                if name not in selection.names:
                    continue
                if (result := check(probe)) is not None:
                    checks.append(result)
                if tick:
                    tick(1, check=name)
    return checks


@dataclass(frozen=True)
class Effort:
    """Which checks are made, and what they cost at most.

    ``calls`` of the model, forward and backward, however many images each has; passes per image, ``each``, and ``right`` more
    where it is right when clean. ``short``: with the images that stand after earlier attacks instead of attacks of its own.
    """

    names: tuple[str, ...]
    calls: int
    each: int
    right: int
    short: bool = True


def efforts(*, embedding: bool, source: bool) -> list[Effort]:
    """Return what can be made, from all checks to those that need no attack.

    Args:
        embedding: whether the model has an embedding that is attacked, too.
        source: whether a second model's images are tried.
    """
    more = [50] * (embedding + source)
    runs = [10, 50, 50, 200, _BOX_STEPS, _BOX_STEPS, 20, 20, 20, 20, *more]
    passes = sum(2 * steps + 3 for steps in runs) + 10 + _QUERIES + 2
    whole = Effort(
        CHECKS, _PLAIN_PASSES + passes, _PLAIN_PASSES, passes, short=False
    )  # each of the passes may be a call
    attacking = {
        "noise": 10,
        "unbounded": 2 * (2 * _FEWER_BOX_STEPS + 3),
        "black box": _FEWER_QUERIES + 2 + 103 * source,
        "monotone": 4 * (2 * 20 + 3),
    }
    names = list(attacking)
    shorter = []
    for count in range(len(names), -1, -1):
        passes = sum(attacking[name] for name in names[:count])
        chosen = tuple(name for name in CHECKS if name in (*_PLAIN, *names[:count]))
        shorter.append(Effort(chosen, _PLAIN_PASSES + passes, _PLAIN_PASSES, passes))
    return [whole, *shorter]


def _in_given_mode(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits in the mode that the model came in, NaN if it fails in that."""
    try:
        return model(torch.cat([x, x]))[: len(x)]  # twice: batch-norm in train mode refuses a single image
    except ModelError:
        return x.new_full((len(x), logits_of(model, x[:1]).shape[1]), torch.nan)


@contextmanager
def _restored(models: list[nn.Module]) -> Generator[None, None, None]:
    """Give back every buffer, and the random states of Python and NumPy, as they were: a model may change them as it runs."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    saved = [
        (module, dict(module._buffers), {name: b.clone() for name, b in module._buffers.items() if b is not None})
        for module in modules
    ]
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, buffers, values in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, value in values.items():
                buffer = cast(Tensor, buffers[name])
                if not torch.equal(buffer, value):  # only then: a buffer may be expanded, and refuse to be written
                    buffer.copy_(value)


class _Probe:
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
        given: _GivenMode,
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


def _check(name: str, passed: bool, seen: str, good: str, bad: str, **numbers: float | Tensor) -> Check:
    values = {key: float(value) for key, value in numbers.items()}
    return Check(name=name, passed=bool(passed), numbers=values, explanation=f"{seen}. {good if passed else bad}.")


def _mode(probe: _Probe) -> Check:
    changed, agree, (training, given) = 0.0, 1.0, probe.given
    if given is not None:
        with fork_rng(
            probe.seed
        ):  # the same draws as for the given mode: noise that the mode has no part in is no difference
            fixed = probe.model(torch.cat([probe.x, probe.x]))[: len(probe.x)]
        changed = float(_distances(given, fixed).max())
        agree = float((CLASSIFICATION.predict(given) == CLASSIFICATION.predict(fixed)).float().mean())
    return _check(
        "mode",
        changed <= 1e-3,
        f"{len(training)} layers came in train mode, and eval mode changes {1 - agree:.0%} of the answers",
        "All figures are of eval mode, and so answers the model that was given",
        f"The model came in train mode ({', '.join(sorted(set(training))[:5])}), where dropout and batch-norm answer otherwise. "
        "All figures are of eval mode; call model.eval() before you attack or deploy it elsewhere",
        changed=changed,
        agreement=agree,
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest difference of logits per image, (B,), relative to the largest logit of all; 1 for NaN."""
    a, b = at_least_float32(a), at_least_float32(b)
    return ((a - b).abs().amax(1) / b.abs().max().clamp_min(1e-30)).nan_to_num(1.0, 1.0, 1.0)


def _deterministic(probe: _Probe) -> Check:
    changed = _distances(probe.model(probe.x), probe.logits)
    return _check(
        "deterministic",
        float(changed.max()) <= 1e-4,
        f"Two passes over the clean images differ by {float(changed.max()):.2g} of the largest logit",
        "The model answers the same twice, so one gradient is the gradient",
        "The model is random in eval mode: one draw's gradient is not that of the next, and one lucky draw counts as robust. "
        "Take the noise out, or evaluate with the suite rand, which averages over draws",
        changed=changed.max(),
        images=(changed > 1e-4).sum(),
    )


def _batch(probe: _Probe) -> Check:
    half = (len(probe.x) + 1) // 2
    again = torch.cat([probe.model(chunk) for chunk in probe.x.flip(0).split(half)]).flip(0)
    changed = _distances(again, probe.logits)
    noise = _distances(probe.model(probe.x), probe.logits)  # of a random model, which is named elsewhere
    return _check(
        "batch",
        float(changed.max()) <= 1e-3 + 2 * float(noise.max()),
        f"In other batches the logits differ by {float(changed.max()):.2g} of the largest",
        "An image's answer does not depend on its neighbours",
        "An image's answer depends on which others are in its batch (batch-norm without running statistics?), so a verdict "
        "holds for one batch only. Give batch-norm track_running_stats=True",
        changed=changed.max(),
    )


def _logits(probe: _Probe) -> Check:
    logits = probe.logits
    probabilities = bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all())
    top = logits.topk(2, dim=1).values
    gap = top[:, 0] - top[:, 1]
    # exp(−87) is the smallest normal float32: beyond, the cross-entropy of a right answer has no gradient left.
    underflow = int((gap > 87).sum())
    if probabilities:
        bad = (
            "They are probabilities, not logits: another softmax flattens them, and the gradient with them. "
            "Return the values before the softmax"
        )
    else:
        bad = (
            "The logits are so large that softmax is exactly 0 and 1, and the cross-entropy has no gradient to follow. Trust the "
            "attacks on the margin, and divide the logits by a temperature"
        )
    return _check(
        "logits",
        not probabilities and underflow <= few(len(logits)),
        f"The outputs lie in [{float(logits.min()):.3g}, {float(logits.max()):.3g}], and the largest is ahead by "
        f"{float(gap.median()):.3g} (median)",
        "They are logits, and the cross-entropy has a gradient",
        bad,
        probabilities=probabilities,
        saturated=underflow / len(logits),
        one_hot=(logits.float().softmax(1).amax(1) == 1).float().mean(),
        largest=logits.abs().max(),
    )


def _normalisation(probe: _Probe) -> Check:
    x, y, n = probe.x, probe.y, len(probe.x)
    given = int(probe.flags.sum())
    flags = {name: CLASSIFICATION.correct(probe.model(changed), y) for name, changed in _variants(x).items()}
    best = max(flags, key=lambda name: int(flags[name].sum()))
    count = int(flags[best].sum())
    # One answer for all images is right as often as its class is there: no proof of a better range.
    chance = float(y.bincount().max()) / n
    better = (
        count > given + few(n)
        and mcnemar(flags[best].tolist(), probe.flags.tolist()).p_value < 0.001
        and binomtest(count, n, chance, alternative="greater").pvalue < 0.001
    )
    reason = {
        "times": "the model expects pixels in [0, 255], or the images were divided by 255 twice; divide once",
        "denormalised": "the images are normalised twice; take one normalisation out of the model or before it",
        "normalised": "the model expects normalised images; give it clead.models.normalize.Normalize as its first layer",
        "channels": "the model expects the colours in the other order (BGR for RGB); swap them",
    }[best.split()[0]]
    return _check(
        "normalisation",
        not better,
        f"{given} of {n} images are right as they are, {count} when {best}",
        "No other preparation of the images suits the model better",
        f"So {reason}",
        given=given / n,
        best=count / n,
    )


def _variants(x: Tensor) -> dict[str, Tensor]:
    """Return the images as a mistake in their preparation would have wanted them."""
    of_the_images = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0).clamp_min(1 / 255)
    half = torch.full_like(of_the_images[0], 0.5)
    statistics = {"their own statistics": of_the_images, "0.5": (half, half)}
    for name, pair in _STATISTICS.items():
        if len(pair[0]) == x.shape[1]:
            statistics[f"those of {name}"] = (x.new_tensor(pair[0]), x.new_tensor(pair[1]))
    variants = {"times 255": 255 * x}
    for name, (mean, std) in statistics.items():
        mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        variants[f"normalised by {name}"] = (x - mean) / std
        variants[f"denormalised by {name}"] = x * std + mean
    if x.shape[1] == 3:
        variants["channels are reversed"] = x.flip(1)
    return variants


def _smooth(probe: _Probe) -> Check:
    """Compare margin(x + τ·sign) − margin(x) with τ·‖gradient‖₁ over the pixels that have room, for two small τ."""
    x, n = probe.x, len(probe.x)
    objective = probe.objective("margin", probe.model, x, probe.y)
    value, gradient = value_and_gradient(objective, x)
    free = box_slack(x, gradient) > 1e-3
    direction = torch.where(free, gradient.sign(), 0)
    slope = flat(gradient * direction).sum(1)
    # Rounding: a change of less is no change. A gradient below it cannot be judged, unless it is exactly 0.
    rounding = 1e-5 * probe.logits.abs().amax(1).clamp_min(1e-30)
    agrees = slope * 1e-3 <= rounding
    for tau in (1e-4, 1e-3):
        ratio = (objective(x + tau * direction) - value) / (tau * slope)
        agrees |= (ratio > 0.5) & (ratio < 2)
    moved = objective(Linf(eps=0.1).random_start(x, generator=probe.generator)) - value
    flat_but_moved = (flat(gradient).abs().amax(1) == 0) & (moved.abs() > rounding)
    wrong = int((~agrees | flat_but_moved).sum())
    random_ = int(((objective(x) - value).abs() > rounding).sum()) > few(n)  # named elsewhere
    return _check(
        "smooth",
        wrong <= max(3, 0.25 * n),
        f"For {wrong} of {n} images a small step along the gradient does not change the margin as the gradient says",
        "The gradient is the slope of what the model computes",
        "The model answers differently each time (see the check deterministic), which hides the slope of what it computes"
        if random_
        else "The model is constant in steps or jumps (inputs rounded, compressed or binarised?), and its gradient is not its "
        "slope. Attack it with a differentiable stand-in for that layer (BPDA, Athalye 2018), and trust black-box attacks only",
        disagree=wrong / n,
    )


def _noise(probe: _Probe) -> Check:
    standing = torch.ones_like(probe.pgd("margin") if probe.earlier is None else probe.earlier)
    for _ in range(10 if probe.m else 0):
        noisy = probe.threat.random_start(probe.x[probe.right], generator=probe.generator)
        standing &= CLASSIFICATION.correct(probe.model(noisy), probe.y[probe.right])
    broken = ~(probe.white_box() if probe.earlier is None else probe.earlier)
    noise, gradient = int((~standing).sum()), int(broken.sum())
    enough = noise <= few(probe.m) or 2 * noise <= gradient or gradient >= probe.m - few(probe.m)
    return _check(
        "noise",
        enough,
        f"Ten draws of noise break {noise} of {probe.m} images, the gradient {gradient}",
        "The gradient finds far more than chance does",
        "Chance breaks about as many as the gradient, so the gradient is of little use. See the checks of the gradients",
        noise=noise,
        gradient=gradient,
        n=probe.m,
    )


def _steps(probe: _Probe) -> Check:
    short, middle = int(probe.pgd("margin", 10).sum()), int(probe.pgd("margin").sum())
    both, long = int(probe.white_box().sum()), int(probe.long().sum())
    return _check(
        "steps",
        both - long <= few(probe.m) and middle - short <= few(probe.m),
        f"Of {probe.m} images PGD-10 leaves {short}, PGD-50 {middle}, PGD-50 with both objectives {both}, and PGD-200 from a new "
        f"start {long} of those",
        "More steps and starts find hardly more, so the attack has converged",
        "The number of steps and starts decides, so the attack has not converged. Raise steps and restarts until nothing changes",
        pgd_10=short,
        pgd_50=middle,
        both_50=both,
        pgd_200=long,
        n=probe.m,
    )


def _agreement(probe: _Probe) -> Check:
    ce, margin = probe.pgd("cross_entropy"), probe.pgd("margin")
    counts = {"cross_entropy": int(ce.sum()), "margin": int(margin.sum())}
    more = 0
    if has_features(probe.model):
        features = probe.pgd("embedding")
        counts["embedding"] = int(features.sum())
        more = int((ce & margin & ~features).sum())
    apart = abs(counts["cross_entropy"] - counts["margin"])
    chance = mcnemar(ce.tolist(), margin.tolist()).p_value > 0.01
    return _check(
        "agreement",
        (apart <= max(3, 0.2 * probe.m) or chance) and more <= few(probe.m),
        f"Of {probe.m} images PGD-50 leaves " + ", ".join(f"{v} by {k.replace('_', '-')}" for k, v in counts.items()),
        "No objective finds what the others miss",
        "One objective breaks what another cannot, so the weaker one's gradient is hidden. Count an image as robust only if it "
        "holds against all of them, and look at the scale of the logits",
        **counts,
        n=probe.m,
    )


def _black_box(probe: _Probe) -> Check | None:
    standing = probe.long() if probe.earlier is None else probe.earlier
    tried: dict[str, int] = {}
    if probe.source is not None:
        left = probe.held("cross_entropy", 50, among=standing, source=probe.source)
        tried["transfer"] = int((standing & ~left).sum())
    square = ATTACKS.get("square")
    # Not in L1: there a few pixels changed a lot break images that no gradient step leads to, on healthy models too.
    if probe.threat.norm in square.norms and probe.threat.norm != "l1":
        chosen, broken = probe.right[standing], 0
        if len(chosen):
            x, y = probe.x[chosen], probe.y[chosen]
            queries = _QUERIES if probe.earlier is None else _FEWER_QUERIES
            x_adv = square(queries=queries).perturb(probe.model, x, y, probe.threat, generator=probe.generator)
            broken = int((~CLASSIFICATION.correct(probe.model(x_adv), y)).sum())
        tried["square"] = broken
    if not tried:
        return None
    return _check(
        "black box",
        max(tried.values()) <= few(probe.m),
        f"Of the {int(standing.sum())} images that stand against the gradient, "
        + " and ".join(f"{name} breaks {count}" for name, count in tried.items()),
        "An attack without the model's gradient finds nothing that the gradient missed",
        "An attack that sees no gradient breaks what the gradient could not: something hides the way from it, and robust accuracy "
        "is lower than gradient attacks say. Trust the suite standard, which includes Square, and look for what hides the gradient",
        standing=standing.sum(),
        **tried,
    )


def _unbounded(probe: _Probe) -> Check:
    # From the image itself: an image of noise is misclassified as it is, which would prove nothing about the gradient.
    box = Linf(eps=1.0)
    steps = _BOX_STEPS if probe.earlier is None else _FEWER_BOX_STEPS
    left = probe.held("margin", steps, threat=box, random_start=False)
    left = probe.held("cross_entropy", steps, threat=box, among=left, random_start=False)
    count = int(left.sum())
    return _check(
        "unbounded",
        count <= few(probe.m),
        f"With any image allowed, PGD-{steps} leaves {count} of {probe.m} right",
        "Without a bound nothing stands, as it must be",
        "Without a bound every image can be broken, so the attack fails where success is certain, and its result at eps means "
        "nothing. See the checks of gradients and logits",
        left=count,
        n=probe.m,
    )


def _monotone(probe: _Probe) -> Check:
    counts: dict[str, int] = {}
    for factor in (0.25, 0.5, 1.0, 2.0):
        try:
            # Every radius has its own attack: a larger ball contains the smaller, so finding less in it is the attack's fault.
            threat = replace(cast(Any, probe.threat), eps=Ratio(factor * probe.threat.eps))
        except ValueError:  # a radius that this norm does not have
            continue
        counts[f"{factor:g} eps"] = int(probe.held("margin", 20, threat=threat).sum())
    values = list(counts.values())
    rise = max((after - before for before, after in zip(values, values[1:], strict=False)), default=0)
    return _check(
        "monotone",
        rise <= few(probe.m),
        f"PGD-20 leaves {', '.join(f'{count} at {name}' for name, count in counts.items())} of {probe.m} images",
        "Accuracy falls as the radius grows",
        "In a larger ball the attack breaks fewer images, though it contains the smaller one: it is misled. Try other step sizes "
        "and more steps",
        rise=rise,
        n=probe.m,
        **counts,
    )


def _gradients(probe: _Probe) -> Check:
    n, numbers = len(probe.x), {}
    broken = zero = 0
    for name in ("cross_entropy", "margin"):
        _, gradient = value_and_gradient(probe.objective(name, probe.model, probe.x, probe.y), probe.x)
        largest = flat(gradient).abs().amax(1)
        missing = int((largest == 0).sum())
        zero, broken = max(zero, missing), max(broken, int((~torch.isfinite(largest)).sum()))
        numbers[f"zero_{name}"] = missing / n
        numbers[f"median_{name}"] = float(largest.nan_to_num(0, 0, 0).median())
    seen = f"The gradient is 0 for {zero} of {n} images and not finite for {broken}"
    return _check(
        "gradients",
        zero <= few(n) and broken == 0 and probe.lost == 0,
        seen + (f"; attacks met {probe.lost} more that are not finite" if probe.lost else ""),
        "There is a gradient to follow",
        "An attack cannot follow a gradient that is 0 or not a number. Look for rounding, detach, thresholds, saturated logits, "
        "and sqrt, log or division at 0 in the model",
        not_finite=broken / n,
        lost=probe.lost,
        **numbers,
    )


_CHECKS: dict[str, Callable[[_Probe], Check | None]] = {
    "mode": _mode,
    "deterministic": _deterministic,
    "batch": _batch,
    "logits": _logits,
    "normalisation": _normalisation,
    "smooth": _smooth,
    "noise": _noise,
    "steps": _steps,
    "agreement": _agreement,
    "black box": _black_box,
    "unbounded": _unbounded,
    "monotone": _monotone,
    "gradients": _gradients,  # last: it also counts what the attacks met
}
CHECKS = tuple(_CHECKS)
"""The names of the checks, in the order in which they are made."""
