"""Attack a fixed model on fixed images, verify every adversarial image, and take the worst case per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from clead.attacks.runner import logits_of
from clead.config import Eval
from clead.errors import memory_of
from clead.evaluation import processes
from clead.evaluation.attacking import attack_batches
from clead.evaluation.correctness import exact_float32
from clead.evaluation.curve import masking_checks, radii_around, robustness_curve
from clead.evaluation.extent import expected_parts, extent
from clead.evaluation.plan import EvaluationOptions, EvaluationPlan, make_plan
from clead.evaluation.preparation import check_plan
from clead.evaluation.processes import SINGLE_SHARD, Shard
from clead.evaluation.recording import Evaluation, make_evaluation
from clead.evaluation.state import ResumableResults
from clead.evaluation.suites import LOWER_PRECISION, NamedAttack
from clead.interfaces import ImageSet, Threat
from clead.models.seeding import fork_rng
from clead.progress import Tick, progress, scaled
from clead.results.record import Check, CurvePoint
from clead.results.target import EvaluationTarget


@memory_of("the evaluation", "eval.batch_size")
def evaluate_model(
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
    """Attack ``model`` on ``images`` and return the record: clean, each attack, the worst case per image.

    An image counts as robust only if it is classified right when clean and after every attack. The attacks of a suite run one
    after the other on the images that held so far (suite ``pgd``, and attacks given by hand: each on all images). The model is
    in eval mode and left bit-identical; verdicts are of the model itself in float32, whatever the search ran in; every
    adversarial image is re-classified and its norm re-measured.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K).
        images: what to attack; all of them, in batches that are moved to the device one at a time.
        threat: norm and radius.
        settings: suite, batch size, seed, curve, gallery.
        target: names and fingerprints for the record, and the task.
        attacks: instead of the suite that ``settings`` names.
        more: attacks after those of the suite, on what it left.
        options: device, saved state, sharing among processes.

    Returns:
        The evaluation; None if ``options`` ask for one shard only. Raises UserError if the model's logits are not (B, K), not
        finite, or the images are not valid, or the state is of another evaluation.
    """
    options = options or EvaluationOptions()
    plan, notes = make_plan(model, images, threat, settings, target, attacks=attacks, more=more, options=options)
    return carry_out(plan, notes, options, Procedure(check_plan, attack_batches, _curve_and_checks, make_evaluation))


class Procedure(NamedTuple):
    """What is done with a plan. What is to be noted in the record is returned last.

    Attributes:
        check: raises what can be wrong before there is a state; says whether a gradient reaches the images.
        attack: computes what is missing of a shard's parts.
        examine: returns a curve and the checks of gradient masking, from the parts of all shards.
        record: makes the evaluation.
    """

    check: Callable[[EvaluationPlan], tuple[bool, list[str]]]
    attack: Callable[[EvaluationPlan, ResumableResults, Shard, Tick], list[str]]
    examine: Callable[
        [EvaluationPlan, ResumableResults, bool, Sequence[Tick]], tuple[list[CurvePoint], list[Check], list[str]]
    ]
    record: Callable[..., Evaluation]


def carry_out(
    plan: EvaluationPlan, notes: list[str], options: EvaluationOptions, procedure: Procedure
) -> Evaluation | None:
    """Do what ``procedure`` says with ``plan``, keeping what is finished and sharing it out; ``notes`` are for the record."""
    start, settings = time.monotonic(), plan.settings
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    # A caller's inference mode would refuse any gradient.
    with torch.inference_mode(False), exact_float32(), fork_rng(settings.seed):
        has_gradient, gradient_notes = procedure.check(plan)
        notes += gradient_notes
        if settings.precision != "float32":
            notes.append(f"{LOWER_PRECISION} {settings.precision} and may find less; verdicts are in float32")
        group = processes.group() if options.shard is None and not options.merge else None
        shard = options.shard or (Shard(group.rank + 1, group.world_size) if group else SINGLE_SHARD)
        header = plan.header(shard)
        store = ResumableResults(options.state and shard.folder(options.state), header, trust=options.trust_state)
        merged = {}
        if options.merge:
            assert options.state is not None, "shards are merged from their states"
            merged, merge_notes = processes.merged(options.state, header, set(plan.keys()), trust=options.trust_state)
            notes += merge_notes
        with store.opened():
            store.parts.update(merged)
            with _progress(plan, shard, curve=has_gradient and options.shard is None, show=options.show) as ticks:
                notes += procedure.attack(plan, store, shard, ticks[0])
                notes += store.notes
                if options.shard is not None:
                    return None
                if group:
                    parts = group.gather(header, store.parts)
                    if parts is None:  # rank 0 draws what is drawn once
                        return group.broadcast(None)
                    store.parts.update(parts)
                curve, checks, more_notes = procedure.examine(plan, store, has_gradient, ticks)
            evaluation = procedure.record(plan, store, curve, checks, [*notes, *more_notes], start)
    return group.broadcast(evaluation) if group else evaluation


def _curve_and_checks(
    plan: EvaluationPlan, store: ResumableResults, has_gradient: bool, ticks: Sequence[Tick]
) -> tuple[list[CurvePoint], list[Check], list[str]]:
    """Return the curve, the checks of gradient masking, and notes on what of them was limited or left out."""
    curve, checks, notes = [], [], []
    if has_gradient:
        limits = extent(plan, store)
        curve = robustness_curve(plan, store, radii_around(plan.threat, limits.curve_points), limits, ticks[1])
        checks = masking_checks(plan, store, limits, ticks[2])
        notes += limits.notes if plan.draws == 1 else ()
    if plan.draws > 1:
        notes.append("suite rand: no checks of gradient masking, which are for models that answer the same twice")
        x, _ = plan.inputs(slice(0, 1))
        if torch.equal(logits_of(plan.model, x), logits_of(plan.model, x)):
            notes.append("the model answers the same twice, so suite rand says less than standard: use that")
    if not has_gradient:
        notes.append("the model has no gradient: no curve and no checks of gradient masking")
    return curve, checks, notes


@contextmanager
def _progress(
    plan: EvaluationPlan, shard: Shard, *, curve: bool, show: bool
) -> Generator[tuple[Tick, Tick, Tick], None, None]:
    """Yield the ticks of attacks, curve and checks, which advance one bar together; all of it is the shard's images.

    curve: whether curve and checks are made at all.
    """
    count = sum(plan.where(b).stop - plan.where(b).start for b in range(plan.batches) if shard.has(b))
    attacks = len(plan.images) * (1.0 + sum(named.cost for named in plan.attacks))
    radii = len(radii_around(plan.threat, plan.settings.curve_points)) if curve else 0
    after = expected_parts(plan, attacks, radii) if curve else (0.0, 0.0)
    tick_scale = 1 / (1 + sum(after))
    with progress(f"evaluate {plan.target.name}", count, show=show) as tick:
        tick = scaled(tick, tick_scale)
        yield tick, scaled(tick, after[0] * count), scaled(tick, after[1] * count)
