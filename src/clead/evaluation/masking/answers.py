"""Checks that attack nothing: how the model answers, and what its gradient is."""

from __future__ import annotations

import torch
from torch import Tensor

from clead.attacks.gradient import value_and_gradient
from clead.evaluation.masking.probe import Probe, check, distances, few
from clead.models.seeding import fork_rng
from clead.results.record import Check
from clead.results.statistics import mcnemar
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import box_slack, flat
from clead.threats.linf import Linf

_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "MNIST": ((0.1307,), (0.3081,)),
}


def mode(probe: Probe) -> Check:
    """Compare the answers in eval mode with those in the mode that the model came in."""
    changed, agree, (training, given) = 0.0, 1.0, probe.given
    if given is not None:
        with fork_rng(
            probe.seed
        ):  # the same draws as for the given mode: noise that the mode has no part in is no difference
            fixed = probe.model(torch.cat([probe.x, probe.x]))[: len(probe.x)]
        changed = float(distances(given, fixed).max())
        agree = float((CLASSIFICATION.predict(given) == CLASSIFICATION.predict(fixed)).float().mean())
    return check(
        "mode",
        changed <= 1e-3,
        f"{len(training)} layers came in train mode, and eval mode changes {1 - agree:.0%} of the answers",
        "All figures are of eval mode, and so answers the model that was given",
        f"The model came in train mode ({', '.join(sorted(set(training))[:5])}), where dropout and batch-norm answer otherwise. "
        "All figures are of eval mode; call model.eval() before you attack or deploy it elsewhere",
        changed=changed,
        agreement=agree,
    )


def deterministic(probe: Probe) -> Check:
    """Ask for the same logits twice."""
    changed = distances(probe.model(probe.x), probe.logits)
    return check(
        "deterministic",
        float(changed.max()) <= 1e-4,
        f"Two passes over the clean images differ by {float(changed.max()):.2g} of the largest logit",
        "The model answers the same twice, so one gradient is the gradient",
        "The model is random in eval mode: one draw's gradient is not that of the next, and one lucky draw counts as robust. "
        "Take the noise out, or evaluate with the suite rand, which averages over draws",
        changed=changed.max(),
        images=(changed > 1e-4).sum(),
    )


def batch(probe: Probe) -> Check:
    """Ask for the logits of the same images in other batches."""
    half = (len(probe.x) + 1) // 2
    again = torch.cat([probe.model(chunk) for chunk in probe.x.flip(0).split(half)]).flip(0)
    changed = distances(again, probe.logits)
    noise = distances(probe.model(probe.x), probe.logits)  # of a random model, which is named elsewhere
    return check(
        "batch",
        float(changed.max()) <= 1e-3 + 2 * float(noise.max()),
        f"In other batches the logits differ by {float(changed.max()):.2g} of the largest",
        "An image's answer does not depend on its neighbours",
        "An image's answer depends on which others are in its batch (batch-norm without running statistics?), so a verdict "
        "holds for one batch only. Give batch-norm track_running_stats=True",
        changed=changed.max(),
    )


def logits(probe: Probe) -> Check:
    """Look for probabilities in place of logits, and for logits so large that the cross-entropy has no gradient."""
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
    return check(
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


def normalisation(probe: Probe) -> Check:
    """Try the images as mistakes in their preparation would have wanted them."""
    from scipy.stats import binomtest  # half a second of every start

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
    return check(
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


def smooth(probe: Probe) -> Check:
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
    return check(
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


def gradients(probe: Probe) -> Check:
    """Look for gradients that are 0 or not finite, also where attacks met them."""
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
    return check(
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
