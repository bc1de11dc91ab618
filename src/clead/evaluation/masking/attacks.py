"""Checks that attack: whether the attacks do what they must if the gradient can be followed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from clead.attacks import ATTACKS
from clead.evaluation.masking.probe import Probe, check, few
from clead.models.split import has_features
from clead.results.record import Check
from clead.results.statistics import mcnemar
from clead.settings import Ratio
from clead.tasks.classification import CLASSIFICATION
from clead.threats.linf import Linf

QUERIES, FEWER_QUERIES = 500, 100
BOX_STEPS, FEWER_BOX_STEPS = 50, 15


def noise(probe: Probe) -> Check:
    """Compare random noise with the gradient."""
    standing = torch.ones_like(probe.pgd("margin") if probe.earlier is None else probe.earlier)
    for _ in range(10 if probe.m else 0):
        noisy = probe.threat.random_start(probe.x[probe.right], generator=probe.generator)
        standing &= CLASSIFICATION.correct(probe.model(noisy), probe.y[probe.right])
    broken = ~(probe.white_box() if probe.earlier is None else probe.earlier)
    noise, gradient = int((~standing).sum()), int(broken.sum())
    enough = noise <= few(probe.m) or 2 * noise <= gradient or gradient >= probe.m - few(probe.m)
    return check(
        "noise",
        enough,
        f"Ten draws of noise break {noise} of {probe.m} images, the gradient {gradient}",
        "The gradient finds far more than chance does",
        "Chance breaks about as many as the gradient, so the gradient is of little use. See the checks of the gradients",
        noise=noise,
        gradient=gradient,
        n=probe.m,
    )


def steps(probe: Probe) -> Check:
    """Compare more steps and starts with fewer."""
    short, middle = int(probe.pgd("margin", 10).sum()), int(probe.pgd("margin").sum())
    both, long = int(probe.white_box().sum()), int(probe.long().sum())
    return check(
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


def agreement(probe: Probe) -> Check:
    """Compare the objectives with one another."""
    ce, margin = probe.pgd("cross_entropy"), probe.pgd("margin")
    counts = {"cross_entropy": int(ce.sum()), "margin": int(margin.sum())}
    more = 0
    if has_features(probe.model):
        features = probe.pgd("embedding")
        counts["embedding"] = int(features.sum())
        more = int((ce & margin & ~features).sum())
    apart = abs(counts["cross_entropy"] - counts["margin"])
    chance = mcnemar(ce.tolist(), margin.tolist()).p_value > 0.01
    return check(
        "agreement",
        (apart <= max(3, 0.2 * probe.m) or chance) and more <= few(probe.m),
        f"Of {probe.m} images PGD-50 leaves " + ", ".join(f"{v} by {k.replace('_', '-')}" for k, v in counts.items()),
        "No objective finds what the others miss",
        "One objective breaks what another cannot, so the weaker one's gradient is hidden. Count an image as robust only if it "
        "holds against all of them, and look at the scale of the logits",
        **counts,
        n=probe.m,
    )


def black_box(probe: Probe) -> Check | None:
    """Try an attack by queries, and images of a second model, on what stands against the gradient; None if there is neither."""
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
            queries = QUERIES if probe.earlier is None else FEWER_QUERIES
            x_adv = square(queries=queries).perturb(probe.model, x, y, probe.threat, generator=probe.generator)
            broken = int((~CLASSIFICATION.correct(probe.model(x_adv), y)).sum())
        tried["square"] = broken
    if not tried:
        return None
    return check(
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


def unbounded(probe: Probe) -> Check:
    """Attack without a bound, where nothing can stand."""
    # From the image itself: an image of noise is misclassified as it is, which would prove nothing about the gradient.
    box = Linf(eps=1.0)
    steps = BOX_STEPS if probe.earlier is None else FEWER_BOX_STEPS
    left = probe.held("margin", steps, threat=box, random_start=False)
    left = probe.held("cross_entropy", steps, threat=box, among=left, random_start=False)
    count = int(left.sum())
    return check(
        "unbounded",
        count <= few(probe.m),
        f"With any image allowed, PGD-{steps} leaves {count} of {probe.m} right",
        "Without a bound nothing stands, as it must be",
        "Without a bound every image can be broken, so the attack fails where success is certain, and its result at eps means "
        "nothing. See the checks of gradients and logits",
        left=count,
        n=probe.m,
    )


def monotone(probe: Probe) -> Check:
    """Attack at growing radii, where ever fewer images can stand."""
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
    return check(
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
