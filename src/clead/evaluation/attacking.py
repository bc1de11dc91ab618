"""The attacks of a plan, batch by batch; each finished part is saved, and what was saved before is checked and used again."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from clead.attacks.capabilities import capabilities
from clead.attacks.runner import check_finite, check_inputs, finite_images, logits_of, optimized, run_attack
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import correct_mask, run_microbatched
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.preparation import hints, one_logit
from clead.evaluation.processes import Shard
from clead.evaluation.rechecked import attack_agrees, clean_agrees
from clead.evaluation.state import Part, ResumableResults
from clead.evaluation.suites import NamedAttack
from clead.models.compute_cost import CostMeter
from clead.models.external import ModelError
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.progress import Tick
from clead.results.statistics import estimate
from clead.tasks import Task
from clead.threats.geometry import per_image

_log = logging.getLogger("clead")
OVERFLOW = "look for an overflow, a logarithm or a division by 0 in the model"


def attack_batches(plan: EvaluationPlan, store: ResumableResults, shard: Shard, tick: Tick) -> list[str]:
    """Compute what is missing of this shard's batches, one part per batch and attack, each kept when it is finished.

    Returns what the clean images say of a mistake in the order of the classes or in the pixels.
    """
    batches = [batch for batch in range(plan.batches) if shard.has(batch)]
    costs = [1.0, *(named.cost for named in plan.attacks)]
    finished = right = 0
    start = time.monotonic()
    earlier = frozenset(store.parts)
    _clean_batches(plan, store, batches)
    messages = hints(plan, store, batches)  # before hours of attacks
    for message in messages:
        _log.warning("%s", message)
    for batch in batches:
        rows = plan.where(batch)
        size = rows.stop - rows.start
        clean = store.parts[plan.key(batch, -1)][0]["flags"]
        survivors = clean.clone()
        tick(size * costs[0] / sum(costs), attack="none")
        for stage, named in enumerate(plan.attacks):
            key, chosen = plan.key(batch, stage), survivors if plan.survivors_only else clean
            resumed = key in earlier and key in store.parts
            if resumed and not attack_agrees(plan, batch, stage, store.parts[key], chosen):
                store.drop(_from(plan, store, batch, stage))
            if key not in store.parts:
                seed = make_generator("cpu", plan.settings.seed, stage, batch).initial_seed()
                with fork_rng(seed), naming(plan, batch, named.name):
                    attacked = _attack(plan, batch, stage, chosen)
                store.save(key, *attacked)
            survivors &= store.parts[key][0]["flags"]
            left = right + int(survivors.sum())
            so_far = estimate([True] * left + [False] * (finished + size - left))
            tick(
                size * costs[stage + 1] / sum(costs),
                robust=f"{so_far.accuracy:.1%} ({so_far.low:.1%} – {so_far.high:.1%})",
                attack=named.name,
                speed=f"{finished / (time.monotonic() - start):.2g} images/s" if finished else "–",
            )
        finished, right = finished + size, right + int(survivors.sum())
    return messages


def _clean_batches(plan: EvaluationPlan, store: ResumableResults, batches: Sequence[int]) -> None:
    """Classify all clean images first: a mistake in them is not found hours later, and leaves no state."""
    keys = {batch: plan.key(batch, -1) for batch in batches}
    for batch, key in keys.items():
        if key in store.parts and not clean_agrees(plan, batch, store.parts[key]):
            store.drop(_from(plan, store, batch, -1))
    results = {}
    for batch, key in keys.items():
        if key not in store.parts:
            with naming(plan, batch):
                results[key] = _clean(plan, batch)
    broken = [index for _, ids in results.values() for index in ids]
    if broken and len(broken) == sum(len(tensors["flags"]) for tensors, _ in results.values()):
        raise UserError(
            f"logits must be finite, got NaN or infinity for images {some(broken)}, all there are; {OVERFLOW}"
        )
    for key, (tensors, ids) in results.items():
        store.save(key, tensors, {"seconds": 0.0, "broken": ids})


def _from(plan: EvaluationPlan, store: ResumableResults, batch: int, stage: int) -> list[str]:
    """Return the finished parts of a batch from ``stage`` on: later attacks ran on what it left."""
    keys = (plan.key(batch, later) for later in range(stage, len(plan.attacks)))
    return [key for key in keys if key in store.parts]


@contextmanager
def naming(plan: EvaluationPlan, batch: int, attack: str = "") -> Generator[None, None, None]:
    """Say in an error of the user's model which images it was given."""
    try:
        yield
    except ModelError as error:
        rows, under = plan.where(batch), f" under {attack}" if attack else ""
        raise ModelError(f"{error} (images {rows.start} to {rows.stop - 1}{under})") from error


def _clean(plan: EvaluationPlan, batch: int) -> tuple[dict[str, Tensor], list[int]]:
    """Return which clean images are right, what they are taken for, and the ids of those whose logits are not finite."""
    rows = plan.where(batch)
    x, y = plan.inputs(rows)
    check_inputs(x, y, plan.num_classes, plan.task)
    with fork_rng(make_generator("cpu", plan.settings.seed, -1, batch).initial_seed()):
        logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x, y, plan.microbatch)
        if logits.shape[1] != plan.num_classes:
            what = "gives one logit for two classes" if one_logit(plan.model) else f"returns {logits.shape[1]} logits"
            raise UserError(
                f"the model {what}, the data has {plan.num_classes} classes; "
                "give data of the classes that it was trained for, or name all of the model's in their order: --data.classes FILE"
            )
        finite = torch.isfinite(logits).all(1)
        # NaN is no answer: taken for any class but the right one.
        predicted = torch.where(finite, plan.task.predict(logits), plan.task.rival(logits, y))
        flags = plan.task.correct(logits, y) if plan.draws == 1 else _right(plan, x, y, plan.draws, plan.task)
    tensors = {"flags": flags.cpu(), "predicted": predicted.cpu()}
    return tensors, [rows.start + index for index in (~finite).nonzero()[:, 0].tolist()]


def _attack(plan: EvaluationPlan, batch: int, stage: int, survivors: Tensor) -> Part:
    """Run one attack on one batch, on the images in ``survivors``, (B,) bool."""
    start = time.monotonic()
    named, rows = plan.attacks[stage], plan.where(batch)
    chosen = survivors.nonzero()[:, 0]
    flags = torch.zeros(len(survivors), dtype=torch.bool)
    predicted = plan.images.labels[rows].clone()
    if not len(chosen):
        counts = dict.fromkeys(("attacked", "forwards", "backwards", "calls"), 0)
        return {"flags": flags, "predicted": predicted}, {**counts, "seconds": 0.0, "largest": 0.0, "lost": []}
    x, y = (values[chosen.to(plan.device)] for values in plan.inputs(rows))
    generator = make_generator(plan.device, plan.settings.seed, stage, batch)
    with CostMeter(plan.model) as meter:
        x_adv = search(plan, named, x, y, generator)
        task, aim = named.goal(plan.task, y)
        robust = _right(plan, x_adv, aim, plan.draws, task).cpu()
    finite = finite_images(x_adv)  # elsewhere the gradient is NaN: the image counts as broken, and is kept as it was
    if batch == stage == 0 and (len(chosen) > 1 or len(plan.images) == 1):
        check_finite(x_adv, named.name)  # raises if it is so of all: a model of which nothing can be known
    lost = (chosen[~finite.cpu()] + rows.start).tolist()
    x_adv = torch.where(per_image(finite, x), x_adv, x)
    size = plan.threat.distance(x_adv - x).max().item()
    flags[chosen] = robust
    if not robust.all():
        wrong = (~robust).to(plan.device)
        rivals = run_microbatched(
            lambda x, y: plan.task.rival(logits_of(plan.model, x), y), x_adv[wrong], y[wrong], plan.microbatch
        )
        predicted[chosen[~robust]] = rivals.cpu()
    # Pictures show the attack that broke the image, else the last one tried.
    last = stage == len(plan.attacks) - 1
    saved = (chosen + rows.start < plan.num_saved) & (~robust | last) & finite.cpu()
    data = {
        "attacked": len(chosen),
        "seconds": time.monotonic() - start,
        "forwards": meter.forwards,
        "backwards": meter.backwards,
        "calls": meter.calls,
        "largest": size,
        "lost": lost,
    }
    tensors = {"flags": flags, "predicted": predicted, "index": chosen[saved] + rows.start, "x_adv": x_adv.cpu()[saved]}
    return tensors, data


def search(plan: EvaluationPlan, named: NamedAttack, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Run the attack, in smaller pieces if the device is out of memory, and again where its success was one of rounding only."""
    task, y = named.goal(plan.task, y)

    def run(x: Tensor, y: Tensor, precision: torch.dtype | None) -> Tensor:
        return run_microbatched(
            lambda x, y: run_attack(
                named.attack,
                plan.model,
                x,
                y,
                plan.threat,
                objective=named.objective,
                task=task,
                generator=generator,
                checked=True,
                precision=precision,
            ),
            x,
            y,
            plan.microbatch,
        )

    precision = getattr(torch, plan.settings.precision)
    x_adv = run(x, y, precision)
    able = capabilities(named.attack)
    if able.searches and plan.draws == 1:
        # A search leaves an image as soon as the model it sees (folded, in lower precision) is wrong about it.
        with attack_mode(plan.model), torch.no_grad(), optimized(plan.model, x, precision) as answer:
            left = run_microbatched(lambda x, y: ~task.correct(answer(x), y), x_adv, y, plan.microbatch)
        if able.returns_clean:  # they return the image itself where they failed
            left |= (x_adv != x).flatten(1).any(1)
        again = left & _right(plan, x_adv, y, 1, task)
        if again.any():
            x_adv[again] = run(x[again], y[again], None)
    return x_adv


def _right(plan: EvaluationPlan, x: Tensor, y: Tensor, draws: int, task: Task) -> Tensor:
    return run_microbatched(lambda x, y: correct_mask(plan.model, x, y, draws, task), x, y, plan.microbatch)


def some(indices: Sequence[int], most: int = 20) -> str:
    """Return the first of ``indices`` as text, and how many more there are."""
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{list(indices[:most])}{more}"
