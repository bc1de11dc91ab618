"""What follows the attacks: robust accuracy at other radii, and the checks of gradient masking, on the first images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from clead.attacks.capabilities import attack_name
from clead.attacks.pgd import PGD
from clead.data.loaders import make_generator
from clead.errors import UserError, out_of_memory
from clead.evaluation import masking
from clead.evaluation.attacking import search
from clead.evaluation.correctness import correct_mask
from clead.evaluation.extent import Extent
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.state import ResumableResults
from clead.evaluation.suites import NamedAttack
from clead.interfaces import Threat
from clead.progress import Tick, scaled
from clead.results.record import Check, CurvePoint
from clead.results.statistics import estimate
from clead.settings import Ratio, validated

_STREAM = 1000  # number of the random stream, past those of the attacks


def radii_around(threat: Threat, points: int) -> list[Ratio]:
    """Return ``points`` radii from eps/… to 2·eps, with eps itself among them when ``points`` is even."""
    eps = Ratio(threat.eps)
    radii = []
    for k in range(1, points + 1):
        factor = 2 * k / points
        if eps.text.endswith("/255") and eps.text.count("/") == 1:
            radius = Ratio(f"{float(eps.text.split('/')[0]) * factor:.4g}/255")
        else:
            radius = Ratio(float(f"{float(eps) * factor:.4g}"))
        try:
            validated(type(threat), {"eps": radius})
        except UserError:  # beyond what this norm's scale allows
            continue
        radii.append(radius)
    return radii


def robustness_curve(
    plan: EvaluationPlan, store: ResumableResults, radii: Sequence[Ratio], limits: Extent, tick: Tick
) -> list[CurvePoint]:
    """Return robust accuracy at ``radii``, under PGD on the margin, on the first images; ``tick`` advances by 1 in all."""
    n = limits.curve_images
    if not n:
        return []
    clean = plan.flags(store, -1)[:n]
    pgd = PGD(steps=limits.curve_steps, keep="best")
    named = NamedAttack(attack_name(pgd, "margin"), pgd, "margin")
    points = []
    for number, radius in enumerate(radii):
        key = f"curve-{limits.curve_steps}-{n}-{number:02d}-of-{len(radii):02d}"
        if key not in store.parts:
            flags = clean.clone()
            at_radius = replace(plan, threat=replace(cast(Any, plan.threat), eps=radius))
            for batch in range(-(-n // plan.batch_size)):
                rows = slice(batch * plan.batch_size, min((batch + 1) * plan.batch_size, n))
                chosen = clean[rows].nonzero()[:, 0]
                if len(chosen):
                    x, y = (values[chosen.to(plan.device)] for values in plan.inputs(rows))
                    generator = make_generator(plan.device, plan.settings.seed, _STREAM, number, batch)
                    x_adv = search(at_radius, named, x, y, generator)
                    flags[rows.start + chosen] = correct_mask(plan.model, x_adv, y, task=plan.task).cpu()
                tick((rows.stop - rows.start) / (n * len(radii)), curve=radius.text)
            store.save(key, {"flags": flags}, {})
        else:
            tick(1 / len(radii), curve=radius.text)
        robust = estimate(store.parts[key][0]["flags"].tolist())
        points.append(CurvePoint(eps=float(radius), eps_text=radius.text, attack=named.name, robust=robust))
    return points


def masking_checks(plan: EvaluationPlan, store: ResumableResults, limits: Extent, tick: Tick) -> list[Check]:
    """Return the checks of gradient masking on the first images; ``tick`` advances by 1 in all."""
    n, effort = limits.check_images, limits.checks
    if not n or plan.draws > 1:
        return []
    key = f"checks-{n}" + (f"-{len(effort.names)}" if effort.short else "")
    if key in store.parts:
        tick(1)
    else:
        x, y = plan.inputs(slice(0, n))
        standing = None
        if effort.short:  # which images are right when clean and after every attack
            flags = [plan.flags(store, stage) for stage in range(-1, len(plan.attacks))]
            standing = torch.stack(flags).all(0)[:n].to(plan.device)
        while True:
            try:
                checks = masking.run_checks(
                    plan.model,
                    x,
                    y,
                    plan.threat,
                    seed=plan.settings.seed,
                    source=plan.source,
                    tick=scaled(tick, 1 / len(effort.names)),
                    selection=masking.Selection(effort.names, standing),
                )
                break
            except (RuntimeError, MemoryError) as error:
                if len(x) < 16 or not out_of_memory(error):
                    raise
                x, y = x[: len(x) // 2], y[: len(y) // 2]
                standing = None if standing is None else standing[: len(x)]
                warnings.warn(f"the device is out of memory: {len(x)} images for the checks", stacklevel=2)
        store.save(key, {}, {"checks": [check.model_dump() for check in checks]})
    return [Check.model_validate(check) for check in store.parts[key][1]["checks"]]
