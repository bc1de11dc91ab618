"""Masks under attack: every attack on every image, the worst case chosen per image, for right pixels and for the mIoU.

An image is a share of right pixels, so none is ever broken: no attack stops early and none leaves out what an earlier one broke.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clead.attacks.capabilities import capabilities
from clead.attacks.runner import (
    check_applicable,
    check_finite,
    check_inputs,
    finite_images,
    image_gradient,
    logits_of,
    run_attack,
)
from clead.config import Eval
from clead.data.loaders import make_generator
from clead.errors import UserError, memory_of
from clead.evaluation.attacking import OVERFLOW, naming, some
from clead.evaluation.correctness import run_microbatched
from clead.evaluation.evaluator import Procedure, carry_out
from clead.evaluation.mask_checks import mask_checks, mask_curve
from clead.evaluation.mask_record import mask_evaluation
from clead.evaluation.objects import object_scores
from clead.evaluation.plan import EvaluationOptions, EvaluationPlan, make_plan
from clead.evaluation.processes import Shard
from clead.evaluation.recording import Evaluation
from clead.evaluation.state import Part, ResumableResults
from clead.evaluation.suites import NamedAttack
from clead.evaluation.tasks import EVALUATORS
from clead.interfaces import ImageSet, Threat
from clead.models.compute_cost import CostMeter
from clead.models.seeding import fork_rng
from clead.models.split import SplitModel, adapt
from clead.progress import Tick
from clead.results.record import Check, CurvePoint
from clead.results.target import EvaluationTarget
from clead.tasks.segmentation import SEGMENTATION
from clead.threats.geometry import per_image

_ROUNDING = 1e-3  # of the pixels: what a batch of another size may change


@EVALUATORS.register("segmentation")
@memory_of("the evaluation", "eval.batch_size")
def evaluate(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    target: EvaluationTarget,
    *,
    attacks: Sequence[NamedAttack] | None = None,
    more: Sequence[NamedAttack] = (),
    options: EvaluationOptions | None = None,
) -> Evaluation | None:
    """Attack masks and return the record; the arguments are those of ``evaluate_model``, ``images.labels`` are masks (N, H, W)."""
    if more:
        raise UserError("--transfer-from: images of other models are tried on classifiers only; leave it out")
    if not isinstance(model, SplitModel):
        model = adapt(model, sample_shape=tuple(images.images[:1].shape[1:]))
    options = options or EvaluationOptions()
    if options.keep_adversarial:
        raise UserError(
            "--save-adversarial: its file has one label per image, not a mask; use clead attack RUN --save FILE.npz"
        )
    plan, notes = make_plan(model, images, threat, settings, target, attacks=attacks, more=(), options=options)
    return carry_out(plan, notes, options, Procedure(_check, _attack_all, _examine, mask_evaluation))


def _check(plan: EvaluationPlan) -> tuple[bool, list[str]]:
    """Raise UserError if masks, model and attacks do not go together, or a gradient does not reach the images."""
    x, y = plan.inputs(slice(0, 1))
    check_inputs(x, y, plan.num_classes, plan.task)
    outputs = logits_of(plan.model, x)
    plan.task.check(outputs, y)
    if outputs.shape[1] != plan.num_classes:
        raise UserError(
            f"the model has {outputs.shape[1]} classes per pixel, the data has {plan.num_classes}; "
            "give data of the classes that it was trained for"
        )
    for named in plan.attacks:
        able = capabilities(named.attack)
        if able.searches and not able.per_pixel:
            raise UserError(
                f"{named.name} looks for an image that is wrong as a whole, a mask is wrong in parts; "
                "use --attack.name pgd, or --eval.suite sea"
            )
        check_applicable(named.attack, plan.threat, plan.task, named.objective)
    if image_gradient(plan.model, x) is None:
        raise UserError(
            "the model gives no gradient to its images (it detaches them, runs under no_grad, or is no PyTorch code), which every "
            "attack on masks needs; take detach() and no_grad out of its forward"
        )
    return True, []


def _attack_all(plan: EvaluationPlan, store: ResumableResults, shard: Shard, tick: Tick) -> list[str]:
    """Compute what is missing of this shard's parts, one per batch and attack, each kept when it is finished."""
    batches = [batch for batch in range(plan.batches) if shard.has(batch)]
    earlier, lowest = frozenset(store.parts), {}
    for batch in batches:
        key = plan.key(batch, -1)
        if key in earlier and not _agrees(plan, batch, store.parts[key]):
            store.drop([other for other in store.parts if other.startswith((key[:6], "curve", "checks"))])
        if key not in store.parts:
            with naming(plan, batch):
                store.save(key, *_clean(plan, batch))
        lowest[batch] = _accuracy(store.parts[key][0]["counts"])
    costs = [named.cost for named in plan.attacks]
    for batch in batches:
        rows = plan.where(batch)
        for stage, named in enumerate(plan.attacks):
            key = plan.key(batch, stage)
            if key not in store.parts:
                seed = make_generator("cpu", plan.settings.seed, stage, batch).initial_seed()
                with fork_rng(seed), naming(plan, batch, named.name):
                    store.save(key, *_attack(plan, batch, stage, lowest))
            lowest[batch] = torch.minimum(lowest[batch], _accuracy(store.parts[key][0]["counts"]))
            tick(
                (rows.stop - rows.start) * costs[stage] / sum(costs),
                accuracy=f"{torch.cat([lowest[done] for done in batches if done <= batch]).mean():.1%}",
                attack=named.name,
            )
    return []


def _clean(plan: EvaluationPlan, batch: int) -> Part:
    rows = plan.where(batch)
    x, y = plan.inputs(rows)
    check_inputs(x, y, plan.num_classes, plan.task)
    logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x, y, plan.microbatch)
    broken = (~torch.isfinite(logits).flatten(1).all(1)).nonzero()[:, 0]
    if len(broken) == len(x):
        raise UserError(
            f"logits must be finite, got NaN or infinity for images {some((broken + rows.start).tolist())}; {OVERFLOW}"
        )
    return _judged(logits, y), {"seconds": 0.0, "broken": (broken + rows.start).tolist()}


def _attack(plan: EvaluationPlan, batch: int, stage: int, lowest: dict[int, Tensor]) -> Part:
    """Run one attack on all images of a batch, and judge what it made by the model itself in float32.

    lowest: batch -> the smallest share of right pixels of each image so far. The images with the smallest of all are kept.
    """
    start, named, rows = time.monotonic(), plan.attacks[stage], plan.where(batch)
    x, y = plan.inputs(rows)
    y = y.long()
    generator = make_generator(plan.device, plan.settings.seed, stage, batch)

    def attacked(x: Tensor, y: Tensor) -> Tensor:
        return run_attack(
            named.attack,
            plan.model,
            x,
            y,
            plan.threat,
            objective=named.objective,
            task=plan.task,
            generator=generator,
            checked=True,
            precision=getattr(torch, plan.settings.precision),
        )

    with CostMeter(plan.model) as meter:
        x_adv = run_microbatched(attacked, x, y, plan.microbatch)
        logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x_adv, y, plan.microbatch)
    finite = finite_images(x_adv)  # elsewhere the gradient is NaN: every pixel counts as wrong, whatever the model says
    tensors = _judged(torch.where(per_image(finite, logits), logits, torch.nan), y)
    if batch == stage == 0:
        check_finite(x_adv, named.name)
    accuracy = _accuracy(tensors["counts"])
    before = torch.cat([value for number, value in lowest.items() if number < batch] or [torch.zeros(0)])
    saved = (accuracy < lowest[batch]) & finite.cpu()
    worst = torch.cat([before, torch.minimum(accuracy, lowest[batch])]).sort().values[: plan.settings.gallery]
    saved &= accuracy <= (worst[-1] if len(worst) else -1)
    tensors |= {"index": saved.nonzero()[:, 0] + rows.start, "x_adv": x_adv.cpu()[saved]}
    return tensors, {
        "seconds": time.monotonic() - start,
        "forwards": meter.forwards,
        "backwards": meter.backwards,
        "calls": meter.calls,
        "largest": plan.threat.distance(torch.where(per_image(finite, x), x_adv, x) - x).max().item(),
        "lost": ((~finite).nonzero()[:, 0] + rows.start).tolist(),
    }


def _judged(logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return ``counts`` (B, 3, K): pixels right, predicted and true; and ``objects`` (B, 3, 2): number and sum of IoU by size."""
    answers, masks = SEGMENTATION.answers(logits, y).cpu().numpy(), y.cpu().numpy()
    objects = np.stack([object_scores(*pair) for pair in zip(answers, masks, strict=True)])
    return {"counts": SEGMENTATION.counts(logits, y).cpu(), "objects": torch.from_numpy(objects)}


def _accuracy(counts: Tensor) -> Tensor:
    """Return the share of right pixels, (B,) float64, of counts (B, 3, K); 1 without any."""
    right, _, pixels = counts.sum(2).double().unbind(1)
    return torch.where(pixels > 0, right / pixels.clamp_min(1), 1.0)


def _agrees(plan: EvaluationPlan, batch: int, finished: Part) -> bool:
    """Say whether the model answers to the clean images of a batch as a finished part says, up to rounding."""
    counts, again = finished[0].get("counts"), _clean(plan, batch)[0]["counts"]
    if counts is None or counts.shape != again.shape:
        return False
    return bool((counts - again).abs().sum() <= _ROUNDING * again.sum())


def _examine(
    plan: EvaluationPlan, store: ResumableResults, has_gradient: bool, ticks: Sequence[Tick]
) -> tuple[list[CurvePoint], list[Check], list[str]]:
    """Return right pixels at other radii and the checks of gradient masking, of the first images."""
    curve, checks, how = [], [], plan.settings
    keys = f"curve-{how.curve_points}-{how.curve_images}-{how.curve_steps}", f"checks-{how.check_images}"
    for key, make, made in zip(keys, (mask_curve, mask_checks), (curve, checks), strict=True):
        if key not in store.parts:
            results: list[Any] = make(plan, store)
            store.save(key, {}, {"results": [each.model_dump() for each in results]})
        kind = CurvePoint if make is mask_curve else Check
        made += [kind.model_validate(each) for each in store.parts[key][1]["results"]]
    for tick in ticks[1:]:
        tick(1)
    return curve, checks, []
