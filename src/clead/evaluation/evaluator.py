"""Attack a fixed model on fixed images, verify every adversarial image, and take the worst case per image."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clead import __version__
from clead.attacks import OBJECTIVES
from clead.attacks.capabilities import capabilities, weakness_warning
from clead.attacks.objectives import NEED_FEATURES
from clead.attacks.pgd import PGD
from clead.attacks.runner import (
    check_applicable,
    check_finite,
    check_inputs,
    finite_images,
    image_gradient,
    logits_of,
    optimized,
    run_attack,
)
from clead.checkpoint import command, environment, fingerprint
from clead.config import Eval
from clead.data.loaders import make_generator
from clead.errors import UserError, memory_of, out_of_memory
from clead.evaluation import diagnosis, masking, processes
from clead.evaluation.correctness import correct_mask, exact_float32, run_microbatched, to_float
from clead.evaluation.extent import Extent, expected_parts, extent
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.processes import SINGLE_SHARD, Shard
from clead.evaluation.rechecked import attack_agrees, clean_agrees
from clead.evaluation.state import Part, ResumableResults
from clead.evaluation.suites import LOWER_PRECISION, NamedAttack, attack_name, describe, suite
from clead.interfaces import ImageSet, Threat
from clead.models.compute_cost import CostMeter
from clead.models.external import ModelError
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng as global_seed
from clead.models.split import SplitModel, has_features, weights, wrapped
from clead.progress import Tick, progress, scaled
from clead.results.record import (
    AttackPart,
    CheckPart,
    ClassPart,
    CurvePoint,
    DataPart,
    MemoryPart,
    ModelPart,
    PredictionsPart,
    Record,
    ThreatPart,
    TrainingPart,
)
from clead.results.statistics import estimate
from clead.settings import Ratio, validated
from clead.tasks import Task
from clead.threats.geometry import per_image

_log = logging.getLogger("clead")

_MAP_POINTS = 300
_TRIED = 8  # images that are asked whether a gradient reaches them
_OVERFLOW = "look for an overflow, a logarithm or a division by 0 in the model"
_CURVE, _CHECKS = 1000, 1001  # numbers of random streams, past those of the attacks


@dataclass(frozen=True)
class EvaluationTarget:
    """What is evaluated and where it comes from; goes into the record. ``model`` is the architecture's name."""

    name: str
    model: str
    weights: str
    data: str
    split: Literal["train", "val", "test"]
    data_fingerprint: str
    classes: tuple[str, ...]
    training: TrainingPart | None = None
    origin: Literal["test", "val", "train"] = "test"
    skipped: tuple[str, ...] = ()
    total: int | None = None

    def data_part(self, images: ImageSet) -> DataPart:
        """Return what a record says of the evaluated images."""
        return DataPart(
            name=self.data,
            split=self.split,
            n=len(images),
            classes=list(self.classes),
            fingerprint=self.data_fingerprint,
            images=digest(images),
            origin=self.origin,
            skipped=list(self.skipped),
            total=self.total,
        )


@dataclass(frozen=True)
class Evaluation:
    """A record, and the tensors that its pictures are drawn from (names as in ``report/run.py``).

    ``adversarial`` holds every image after the last attack on it, in the order of the evaluated images, if it was asked for.
    """

    record: Record
    artifacts: dict[str, Tensor]
    adversarial: Tensor | None = None


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
    device: torch.device | None = None,
    state: Path | None = None,
    shard: Shard | None = None,
    merge: bool = False,
    trust_state: bool = False,
    keep_adversarial: bool = False,
    source: nn.Module | None = None,
    show: bool = True,
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
        target: names and fingerprints for the record.
        attacks: instead of the suite that ``settings`` names.
        more: attacks after those of the suite, on what it left.
        device: where to compute; that of the model's parameters if None.
        state: a directory for the finished parts: an evaluation that was killed goes on from there. Kept until the caller, who
            has written the record, discards it.
        shard: compute only every so manieth batch and return None; ``state`` then holds the shard.
        merge: take the batches from the states of all shards, which lie beside ``state``.
        trust_state: continue states that another user or another machine made; the record says so.
        keep_adversarial: return every adversarial image, not only those for the pictures.
        source: a second model whose adversarial images are tried on this one, for the checks of gradient masking.
        show: whether to show progress.

    Raises UserError if the model's logits are not (B, K), not finite, or the images are not valid, or the state is of another
    evaluation.
    """
    start = time.monotonic()
    model = wrapped(model)
    if not len(images):
        raise UserError("there is no image to evaluate, got 0; give images (N, C, H, W) and labels (N,), N at least 1")
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    notes: list[str] = []
    survivors_only = attacks is None and settings.suite != "pgd"
    suite_name = "attacks" if attacks is not None else settings.suite
    if attacks is None:
        attacks, notes = suite(settings.suite, threat.norm, len(target.classes), steps=settings.steps)
        attacks, without = _possible(attacks, model)
        notes += without
    doubts = (weakness_warning(named.attack, threat) for named in attacks)
    notes += [doubt for doubt in doubts if doubt]
    plan = EvaluationPlan(
        model,
        images,
        threat,
        settings,
        (*attacks, *more),
        suite_name,
        survivors_only,
        device,
        batch_size=settings.batch_size or _automatic_batch_size(images, device),
        num_saved=len(images) if keep_adversarial else min(max(settings.gallery, _MAP_POINTS), len(images)),
    )
    # A caller's inference mode would refuse any gradient.
    with torch.inference_mode(False), exact_float32(), global_seed(settings.seed):
        gradients, seen = _check_applicable(plan)  # all that can be wrong is said before there is a state
        notes += seen
        group = processes.group() if shard is None and not merge else None
        mine = shard or (Shard(group.rank + 1, group.world_size) if group else SINGLE_SHARD)
        header = _header(plan, mine)
        if settings.precision != "float32":
            notes.append(f"{LOWER_PRECISION} {settings.precision} and may find less; verdicts are in float32")
        assert state is not None or not merge, "shards are merged from their states"
        shared: dict[str, Part] = {}
        if merge and state:
            shared, said = processes.merged(state, header, set(plan.keys()), trust=trust_state)
            notes += said
        store = ResumableResults(mine.folder(state) if state else None, header, trust=trust_state)
        with store.opened():
            store.parts.update(shared)
            with _progress(plan, mine, target, after=gradients and shard is None, show=show) as (tick, after):
                notes += _attack_batches(plan, store, mine, target, tick)
                notes += store.notes
                if shard is not None:
                    return None
                if group:
                    parts = group.gather(header, store.parts)
                    if parts is None:  # rank 0 draws what is drawn once
                        return group.broadcast(None)
                    store.parts.update(parts)
                curve, checks = [], []
                if gradients:
                    limits = extent(plan, store, source=source is not None)
                    radii = _radii(threat, limits.curve_points)
                    notes += limits.notes if plan.draws == 1 else ()
                    curve = _curve(plan, store, radii, limits, scaled(tick, after[0]))
                    checks = _checks(plan, store, source, limits, scaled(tick, after[1]))
            if plan.draws > 1:
                notes.append(
                    "suite rand: no checks of gradient masking, which are for models that answer the same twice"
                )
                x, _ = plan.inputs(slice(0, 1))
                if torch.equal(logits_of(model, x), logits_of(model, x)):
                    notes.append("the model answers the same twice, so suite rand says less than standard: use that")
            if not gradients:
                notes.append("the model has no gradient: no curve and no checks of gradient masking")
            evaluation = _evaluation(plan, store, target, curve, checks, notes, start, keep_adversarial)
    return group.broadcast(evaluation) if group else evaluation


def _header(plan: EvaluationPlan, shard: Shard) -> dict[str, Any]:
    """Return everything that decides the flags: a state is continued only by the same."""
    settings = plan.settings
    return {
        "model": fingerprint(weights(plan.model)) + _structure(plan.model),
        "images": digest(plan.images),
        "threat": f"{plan.threat.norm} {Ratio(plan.threat.eps).text}",
        "suite": plan.suite,
        "attacks": [{"name": named.name, **describe(named)} for named in plan.attacks],
        "seed": settings.seed,
        "batch_size": plan.batch_size,
        "precision": settings.precision,
        "images_kept": plan.num_saved,
        "shard": f"{shard.index}/{shard.count}",
        "device": plan.device.type,
        "clead": __version__,
        # What neither weights nor structure tell: another constant in the model's code gives other answers.
        "answers": [f"{value:.2g}" for value in logits_of(plan.model, plan.inputs(slice(0, 1))[0])[0, :10].tolist()],
    }


@contextmanager
def _progress(
    plan: EvaluationPlan, shard: Shard, target: EvaluationTarget, *, after: bool, show: bool
) -> Generator[tuple[Tick, tuple[float, float]], None, None]:
    """Yield one bar for attacks, curve and checks, and how much of it the last two take; all of it is the shard's images.

    after: whether curve and checks are made at all.
    """
    count = sum(plan.where(b).stop - plan.where(b).start for b in range(plan.batches) if shard.has(b))
    attacks = len(plan.images) * (1.0 + sum(named.cost for named in plan.attacks))
    parts = expected_parts(plan, attacks, len(_radii(plan.threat, plan.settings.curve_points))) if after else (0.0, 0.0)
    whole = 1 + sum(parts)

    with progress(f"evaluate {target.name}", count, show=show) as tick:
        yield scaled(tick, 1 / whole), (parts[0] * count, parts[1] * count)


def _attack_batches(
    plan: EvaluationPlan, store: ResumableResults, shard: Shard, target: EvaluationTarget, tick: Tick
) -> list[str]:
    """Compute what is missing of this shard's batches, one part per batch and attack, each kept when it is finished.

    Returns what the clean images say of a mistake in the order of the classes or in the pixels.
    """
    batches = [batch for batch in range(plan.batches) if shard.has(batch)]
    costs = [1.0, *(named.cost for named in plan.attacks)]
    finished = right = 0
    start = time.monotonic()
    earlier = frozenset(store.parts)
    for batch in batches:
        if (first := plan.key(batch, -1)) in earlier and not clean_agrees(plan, batch, store.parts[first]):
            store.drop(_from(plan, store, batch, -1))
    # All clean images first: a mistake in them is not found hours later, and leaves no state.
    clean = {}
    for batch in batches:
        if plan.key(batch, -1) not in store.parts:
            with _naming(plan, batch):
                clean[plan.key(batch, -1)] = _clean(plan, batch, target)
    broken = [index for _, ids in clean.values() for index in ids]
    if broken and len(broken) == sum(len(tensors["flags"]) for tensors, _ in clean.values()):
        raise UserError(
            f"logits must be finite, got NaN or infinity for images {_some(broken)}, all there are; {_OVERFLOW}"
        )
    for key, (tensors, ids) in clean.items():
        store.save(key, tensors, {"seconds": 0.0, "broken": ids})
    hints = _hints(plan, store, batches, target)  # before hours of attacks
    for hint in hints:
        _log.warning("%s", hint)
    for batch in batches:
        here = plan.where(batch)
        size = here.stop - here.start
        held = store.parts[plan.key(batch, -1)][0]["flags"].clone()
        tick(size * costs[0] / sum(costs), attack="none")
        for stage, named in enumerate(plan.attacks):
            key = plan.key(batch, stage)
            if key in earlier and key in store.parts:
                chosen = held if plan.survivors_only else store.parts[plan.key(batch, -1)][0]["flags"]
                if not attack_agrees(plan, batch, stage, store.parts[key], chosen):
                    store.drop(_from(plan, store, batch, stage))
            if key not in store.parts:
                seed = make_generator("cpu", plan.settings.seed, stage, batch).initial_seed()
                with global_seed(seed), _naming(plan, batch, named.name):
                    part = _attack(plan, store, batch, stage, held)
                store.save(key, *part)
            held &= store.parts[key][0]["flags"]
            left = right + int(held.sum())
            so_far = estimate([True] * left + [False] * (finished + size - left))
            tick(
                size * costs[stage + 1] / sum(costs),
                robust=f"{so_far.accuracy:.1%} ({so_far.low:.1%} – {so_far.high:.1%})",
                attack=named.name,
                speed=f"{finished / (time.monotonic() - start):.2g} images/s" if finished else "–",
            )
        finished, right = finished + size, right + int(held.sum())
    return hints


def _hints(
    plan: EvaluationPlan, store: ResumableResults, batches: Sequence[int], target: EvaluationTarget
) -> list[str]:
    """Say which order of the classes, or which pixels, would make a low clean accuracy high; see ``evaluation/diagnosis.py``."""
    parts = [store.parts[plan.key(batch, -1)][0] for batch in batches]
    if not parts or plan.draws > 1 or any("predicted" not in part for part in parts):
        return []
    labels = torch.cat([plan.images.labels[plan.where(batch)] for batch in batches])
    predicted = torch.cat([part["predicted"] for part in parts])
    hints = [diagnosis.order_hint(predicted, labels, target.classes)]
    if target.training is None:  # clead train gives pixels as its models want them
        start = plan.where(batches[0]).start
        x, y = plan.inputs(slice(start, start + diagnosis.PIXELS))

        def answer(x: Tensor) -> Tensor:
            return run_microbatched(lambda x, y: plan.task.predict(logits_of(plan.model, x)), x, y, plan.microbatch)

        with global_seed(plan.settings.seed):
            hints.append(diagnosis.pixel_hint(answer, x, y, len(target.classes)))
            if _one_logit(plan.model) and predicted.eq(1).all():
                logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x, y, plan.microbatch)
                hints.append(diagnosis.sigmoid_hint(logits[:, 1] - logits[:, 0]))
    return [hint for hint in hints if hint is not None]


def _one_logit(model: nn.Module) -> bool:
    """Say whether ``model`` was seen to give one logit per image, which is taken as two."""
    return any("one logit" in note for note in getattr(model, "notes", ()))


def _from(plan: EvaluationPlan, store: ResumableResults, batch: int, stage: int) -> list[str]:
    """Return the finished parts of a batch from ``stage`` on: later attacks ran on what it left."""
    keys = (plan.key(batch, later) for later in range(stage, len(plan.attacks)))
    return [key for key in keys if key in store.parts]


@contextmanager
def _naming(plan: EvaluationPlan, batch: int, attack: str = "") -> Generator[None, None, None]:
    """Say in an error of the user's model which images it was given."""
    try:
        yield
    except ModelError as error:
        here, under = plan.where(batch), f" under {attack}" if attack else ""
        raise ModelError(f"{error} (images {here.start} to {here.stop - 1}{under})") from error


def _clean(plan: EvaluationPlan, batch: int, target: EvaluationTarget) -> tuple[dict[str, Tensor], list[int]]:
    """Return which clean images are right, what they are taken for, and the ids of those whose logits are not finite."""
    here = plan.where(batch)
    x, y = plan.inputs(here)
    check_inputs(x, y, len(target.classes))
    with global_seed(make_generator("cpu", plan.settings.seed, -1, batch).initial_seed()):
        logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x, y, plan.microbatch)
        if logits.shape[1] != len(target.classes):
            what = "gives one logit for two classes" if _one_logit(plan.model) else f"returns {logits.shape[1]} logits"
            raise UserError(
                f"the model {what}, the data has {len(target.classes)} classes; "
                "give data of the classes that it was trained for, or name all of the model's in their order: --data.classes FILE"
            )
        finite = torch.isfinite(logits).all(1)
        broken = (~finite).nonzero()[:, 0]
        # NaN is no answer: taken for any class but the right one.
        predicted = torch.where(finite, plan.task.predict(logits), plan.task.rival(logits, y))
        flags = plan.task.correct(logits, y) if plan.draws == 1 else _right(plan, x, y, plan.draws, plan.task)
    tensors = {"flags": flags.cpu(), "predicted": predicted.cpu()}
    return tensors, [here.start + index for index in broken.tolist()]


def _attack(
    plan: EvaluationPlan, store: ResumableResults, batch: int, stage: int, held: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run one attack on one batch: on the images that held so far, or on all that are right when clean."""
    start = time.monotonic()
    named, here = plan.attacks[stage], plan.where(batch)
    chosen = (held if plan.survivors_only else store.parts[plan.key(batch, -1)][0]["flags"]).nonzero()[:, 0]
    flags = torch.zeros(here.stop - here.start, dtype=torch.bool)
    predicted = plan.images.labels[here].clone()
    if not len(chosen):
        return {"flags": flags, "predicted": predicted}, {
            "attacked": 0,
            "seconds": 0.0,
            "forwards": 0,
            "backwards": 0,
            "calls": 0,
            "largest": 0.0,
            "lost": [],
        }
    x, y = (part[chosen.to(plan.device)] for part in plan.inputs(here))
    generator = make_generator(plan.device, plan.settings.seed, stage, batch)
    with CostMeter(plan.model) as meter:
        x_adv = _search(plan, named, x, y, generator)
        task, aim = named.goal(plan.task, y)
        robust = _right(plan, x_adv, aim, plan.draws, task).cpu()
    finite = finite_images(x_adv)  # elsewhere the gradient is NaN: the image counts as broken, and is kept as it was
    if batch == stage == 0 and (len(chosen) > 1 or len(plan.images) == 1):
        check_finite(x_adv, named.name)  # raises if it is so of all: a model of which nothing can be known
    lost = (chosen[~finite.cpu()] + here.start).tolist()
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
    kept = (chosen + here.start < plan.num_saved) & (~robust | last) & finite.cpu()
    data = {
        "attacked": len(chosen),
        "seconds": time.monotonic() - start,
        "forwards": meter.forwards,
        "backwards": meter.backwards,
        "calls": meter.calls,
        "largest": size,
        "lost": lost,
    }
    tensors = {"flags": flags, "predicted": predicted, "index": chosen[kept] + here.start, "x_adv": x_adv.cpu()[kept]}
    return tensors, data


def _search(plan: EvaluationPlan, named: NamedAttack, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Run the attack, in smaller pieces if the device is out of memory, and again where its success was one of rounding only."""
    task, y = named.goal(plan.task, y)

    def run(x: Tensor, y: Tensor, **how: Any) -> Tensor:
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
                **how,
            ),
            x,
            y,
            plan.microbatch,
        )

    precision = getattr(torch, plan.settings.precision)
    x_adv = run(x, y, precision=precision)
    able = capabilities(named.attack)
    if able.searches and plan.draws == 1:
        # A search leaves an image as soon as the model it sees (folded, in lower precision) is wrong about it.
        with attack_mode(plan.model), torch.no_grad(), optimized(plan.model, x, precision) as answer:
            left = run_microbatched(lambda x, y: ~task.correct(answer(x), y), x_adv, y, plan.microbatch)
        if able.returns_clean:  # they return the image itself where they failed
            left |= (x_adv != x).flatten(1).any(1)
        again = left & _right(plan, x_adv, y, 1, task)
        if again.any():
            x_adv[again] = run(x[again], y[again], exact=True)
    return x_adv


def _right(plan: EvaluationPlan, x: Tensor, y: Tensor, draws: int, task: Task) -> Tensor:
    return run_microbatched(lambda x, y: correct_mask(plan.model, x, y, draws, task), x, y, plan.microbatch)


def _possible(attacks: Sequence[NamedAttack], model: nn.Module) -> tuple[list[NamedAttack], list[str]]:
    """Return the attacks that can be made on ``model``, and a note on those that need features where none are known."""
    if has_features(model):
        return list(attacks), []
    left_out = [named.name for named in attacks if named.objective in NEED_FEATURES]
    notes = [
        f"no features of the model are known, so the attacks on them are left out: {', '.join(left_out)}; name the layer that "
        "makes the logits of features (B, D): --model.classifier NAME (in Python: clead.adapt)"
    ]
    possible = [named for named in attacks if named.name not in left_out]
    if attacks and not possible:
        raise UserError(*notes)
    return possible, notes if left_out else []


def _check_applicable(plan: EvaluationPlan) -> tuple[bool, list[str]]:
    """Say whether a gradient reaches the images, and what is to be noted of it.

    Raises UserError if an attack cannot be made on this model or in this norm.
    """
    x, y = plan.inputs(slice(0, 1))
    if x.dim() != 4:
        check_inputs(x, y)
    logits_of(plan.model, x)
    for named in plan.attacks:
        task, aim = named.goal(plan.task, y)
        check_applicable(named.attack, plan.threat, task, named.objective)
        if named.target is not None and plan.images.labels.eq(named.target).any():
            raise UserError(
                f"{named.name} aims at class {named.target}: leave out images of that class, images[labels != {named.target}]"
            )
        if not capabilities(named.attack).searches:
            with attack_mode(plan.model):
                OBJECTIVES.get(named.objective)(
                    plan.model, x, y.clamp_min(0)
                )  # one of the embedding needs a split model
    if (gradient := image_gradient(plan.model, x)) is not None:
        with global_seed(plan.settings.seed):
            several = image_gradient(plan.model, plan.inputs(slice(0, _TRIED))[0])
        if several is not None and not several.any() and not gradient.any():
            return True, [
                f"the gradient of the logits to the first {len(several)} images is 0 everywhere (rounding, argmax or a sign in the "
                "model?), so attacks that climb it find nothing: believe --eval.suite queries only"
            ]
        return True, []
    need = [named.name for named in plan.attacks if capabilities(named.attack).needs_gradient]
    if need:
        raise UserError(
            f"the model gives no gradient to its images (it detaches them, runs under no_grad, or is no PyTorch code), which "
            f"{', '.join(need)} needs; use --eval.suite queries"
        )
    return False, []


def _curve(
    plan: EvaluationPlan, store: ResumableResults, radii: Sequence[Ratio], limits: Extent, tick: Tick
) -> list[CurvePoint]:
    """Return robust accuracy at other radii, under PGD on the margin, on the first images; ``tick`` advances by 1 in all."""
    settings, n = plan.settings, limits.curve_images
    if not n:
        return []
    clean = torch.cat([store.parts[plan.key(batch, -1)][0]["flags"] for batch in range(plan.batches)])[:n]
    pgd = PGD(steps=limits.curve_steps, keep="best")
    name, points = attack_name(pgd, "margin"), []
    for number, radius in enumerate(radii):
        key = f"curve-{limits.curve_steps}-{n}-{number:02d}-of-{len(radii):02d}"
        if key not in store.parts:
            flags = clean.clone()
            for batch in range(-(-n // plan.batch_size)):
                here = slice(batch * plan.batch_size, min((batch + 1) * plan.batch_size, n))
                chosen = clean[here].nonzero()[:, 0]
                if len(chosen):
                    x, y = (part[chosen.to(plan.device)] for part in plan.inputs(here))
                    at = replace(cast(Any, plan.threat), eps=radius)
                    generator = make_generator(plan.device, settings.seed, _CURVE, number, batch)
                    x_adv = _search(replace(plan, threat=at), NamedAttack(name, pgd, "margin"), x, y, generator)
                    flags[here.start + chosen] = correct_mask(plan.model, x_adv, y, task=plan.task).cpu()
                tick((here.stop - here.start) / (n * len(radii)), curve=radius.text)
            store.save(key, {"flags": flags}, {})
        else:
            tick(1 / len(radii), curve=radius.text)
        robust = estimate(store.parts[key][0]["flags"].tolist())
        points.append(CurvePoint(eps=float(radius), eps_text=radius.text, attack=name, robust=robust))
    return points


def _checks(
    plan: EvaluationPlan, store: ResumableResults, source: nn.Module | None, limits: Extent, tick: Tick
) -> list[CheckPart]:
    """Return the checks of gradient masking on the first images; ``tick`` advances by 1 in all."""
    n = limits.check_images
    if not n or plan.draws > 1:
        return []
    names = limits.checks.names
    key = f"checks-{n}" + (f"-{len(names)}" if limits.checks.short else "")
    if key not in store.parts:
        x, y = plan.inputs(slice(0, n))
        standing = _standing(plan, store)[:n].to(plan.device) if limits.checks.short else None
        while True:
            try:
                checks = masking.run_checks(
                    plan.model,
                    x,
                    y,
                    plan.threat,
                    seed=plan.settings.seed,
                    source=source,
                    tick=scaled(tick, 1 / len(names)),
                    only=names,
                    standing=standing,
                )
                break
            except (RuntimeError, MemoryError) as error:
                if len(x) < 16 or not out_of_memory(error):
                    raise
                x, y = x[: len(x) // 2], y[: len(y) // 2]
                standing = None if standing is None else standing[: len(x)]
                warnings.warn(f"the device is out of memory: {len(x)} images for the checks", stacklevel=2)
        store.save(key, {}, {"checks": [check.model_dump() for check in checks]})
    else:
        tick(1)
    return [CheckPart.model_validate(check) for check in store.parts[key][1]["checks"]]


def _standing(plan: EvaluationPlan, store: ResumableResults) -> Tensor:
    """Return which images are right when clean and after every attack, (N,)."""
    return torch.cat(
        [
            torch.stack([store.parts[plan.key(b, stage)][0]["flags"] for stage in range(-1, len(plan.attacks))]).all(0)
            for b in range(plan.batches)
        ]
    )


def _evaluation(
    plan: EvaluationPlan,
    store: ResumableResults,
    target: EvaluationTarget,
    curve: list[CurvePoint],
    checks: list[CheckPart],
    notes: list[str],
    start: float,
    keep_adversarial: bool,
) -> Evaluation:
    images, settings, n = plan.images, plan.settings, len(plan.images)

    def all_flags(stage: int) -> Tensor:
        return torch.cat([store.parts[plan.key(batch, stage)][0]["flags"] for batch in range(plan.batches)])

    clean = all_flags(-1)
    robust = clean.clone()
    if clean.float().mean() <= 1 / len(target.classes):
        notes = [
            *notes,
            f"clean accuracy is no better than guessing among {len(target.classes)} classes: are weights and pixels right?",
        ]
    notes = [*notes, *getattr(plan.model, "notes", ()), *_not_finite(plan, store)]
    adversarial = to_float(images.images[: plan.num_saved])
    attacks = []
    for stage, named in enumerate(plan.attacks):
        flags = all_flags(stage)
        parts = [store.parts[plan.key(batch, stage)] for batch in range(plan.batches)]
        for tensors, _ in parts:
            if "index" in tensors:
                # Where several attacks broke an image, the first is shown; an attack that failed never replaces one that did not.
                shown = robust[tensors["index"]]
                adversarial[tensors["index"][shown]] = tensors["x_adv"][shown]
        before = robust if plan.survivors_only else clean
        if named.target is not None:
            notes = [*notes, _targeted_note(target.classes[named.target], named, (before & ~flags)[before])]
        attacks.append(
            AttackPart(
                name=named.name,
                settings=describe(named),
                attacked=int(before.sum()),
                broken=int((before & ~flags).sum()),
                robust=estimate(flags.tolist()),
                flags=flags.tolist(),
                seconds=sum(data["seconds"] for _, data in parts),
                forwards=sum(data["forwards"] for _, data in parts) / n,
                backwards=sum(data["backwards"] for _, data in parts) / n,
                largest=max(data["largest"] for _, data in parts),
                lost=_lost(parts),
            )
        )
        robust = robust & flags
    of_clean, of_robust = (plan.task.metrics(f, images.labels, len(target.classes)) for f in (clean, robust))
    per_class = [
        ClassPart(
            name=name,
            n=of_clean["class_n"][k],
            clean_accuracy=of_clean["class_accuracy"][k],
            robust_accuracy=of_robust["class_accuracy"][k],
        )
        for k, name in enumerate(target.classes)
        if of_clean["class_n"][k]
    ]
    eps = Ratio(plan.threat.eps)
    record = Record(
        run=target.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=command(),
        seed=settings.seed,
        suite=plan.suite,
        notes=notes,
        model=ModelPart(
            name=target.model,
            parameters=sum(p.numel() for key, p in plan.model.named_parameters() if not key.startswith("projection.")),
            weights=target.weights,
            fingerprint=fingerprint(weights(plan.model)),
        ),
        data=target.data_part(images),
        threat=ThreatPart(norm=plan.threat.norm, eps=float(eps), eps_text=eps.text),
        clean=estimate(clean.tolist()),
        clean_flags=clean.tolist(),
        worst=estimate(robust.tolist()),
        robust_flags=robust.tolist(),
        attacks=attacks,
        curve=curve,
        checks=checks,
        per_class=per_class,
        training=target.training,
        predictions=_predictions(plan, store),
        memory=_memory(plan.device),
        versions=environment(),
        # Of an evaluation that was resumed or shared out: the work of all its parts.
        seconds=max(time.monotonic() - start, sum(data.get("seconds", 0.0) for _, data in store.parts.values())),
    )
    shown = adversarial[: min(max(settings.gallery, _MAP_POINTS), n)]
    artifacts = _artifacts(plan.model, images, shown, settings.gallery, plan.batch_size, plan.device)
    return Evaluation(record, artifacts, adversarial if keep_adversarial else None)


def _targeted_note(name: str, named: NamedAttack, taken: Tensor) -> str:
    """Return what a targeted attack has reached; ``taken`` says of each attacked image whether it is taken for the class."""
    success = estimate(taken.tolist()) if len(taken) else None
    rate = "" if success is None else f", {success.accuracy:.1%} (95 % interval {success.low:.1%} – {success.high:.1%})"
    return (
        f"{named.name} is targeted: an image counts as broken only where it is taken for {name}, so its accuracy says nothing of "
        f"other mistakes; {int(taken.sum())} of {len(taken)} images that are right when clean are taken for {name}{rate}"
    )


def _lost(parts: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> list[int]:
    return sorted(index for _, data in parts for index in data.get("lost", ()))


def _not_finite(plan: EvaluationPlan, store: ResumableResults) -> list[str]:
    """Return notes on the images whose logits, or gradient under an attack, are not finite."""
    parts = [store.parts[plan.key(batch, -1)] for batch in range(plan.batches)]
    notes = []
    if broken := [index for _, data in parts for index in data.get("broken", ())]:
        notes.append(
            f"logits must be finite, got NaN or infinity for images {_some(broken)}, which count as wrong; {_OVERFLOW}"
        )
    for stage, named in enumerate(plan.attacks):
        if lost := _lost([store.parts[plan.key(batch, stage)] for batch in range(plan.batches)]):
            notes.append(
                f"the gradient of {named.name} is NaN or infinite at images {_some(lost)}, which count as not robust; "
                "look for sqrt, log or division at 0 in the model"
            )
    return notes


def _some(indices: Sequence[int], most: int = 20) -> str:
    """Return the first of ``indices`` as text, and how many more there are."""
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{list(indices[:most])}{more}"


def _predictions(plan: EvaluationPlan, store: ResumableResults) -> PredictionsPart | None:
    """Return what the images are taken for; None of a randomised model, whose verdict is no single answer."""
    stages = [
        [store.parts[plan.key(batch, stage)][0] for batch in range(plan.batches)]
        for stage in range(-1, len(plan.attacks))
    ]
    # A state that an earlier version left does not hold them.
    if plan.draws > 1 or any("predicted" not in part for stage in stages for part in stage):
        return None
    clean, *attacks = ([torch.cat([part[key] for part in stage]) for key in ("flags", "predicted")] for stage in stages)
    held, attacked = clean[0].clone(), clean[1].clone()
    for flags, predicted in attacks:
        attacked = torch.where(held & ~flags, predicted, attacked)
        held &= flags
    return PredictionsPart(labels=plan.images.labels.tolist(), clean=clean[1].tolist(), attacked=attacked.tolist())


def _memory(device: torch.device) -> MemoryPart:
    """Return the most memory that was in use, as far as the system tells."""
    status = Path("/proc/self/status")  # not getrusage, whose figure a process inherits from the one that started it
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return MemoryPart(
        process=1024 * int(peak[1]) if peak else None,
        device=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _automatic_batch_size(images: ImageSet, device: torch.device) -> int:
    """Return how many images are attacked at once: enough to keep the device busy; halved where memory is short."""
    size = images.images[0].numel()
    if device.type == "cpu":
        return max(1, min(256, 256 * 3072 // size))
    return max(1, min(2048, 2048 * 3072 // size))


def _structure(model: nn.Module) -> str:
    """Return a digest of what the weights do not tell: the same ones in another network are another model."""
    return hashlib.sha256(repr(model).encode()).hexdigest()[:8]


def _radii(threat: Threat, points: int) -> list[Ratio]:
    """Return ``points`` radii from eps/… to 2·eps, with eps itself among them when ``points`` is even."""
    eps = Ratio(threat.eps)
    radii = []
    for k in range(1, points + 1):
        part = 2 * k / points
        if eps.text.endswith("/255") and eps.text.count("/") == 1:
            radii.append(Ratio(f"{float(eps.text.split('/')[0]) * part:.4g}/255"))
        else:
            radii.append(Ratio(float(f"{float(eps) * part:.4g}")))
    kept = []
    for radius in radii:
        try:
            validated(type(threat), {"eps": radius})
        except UserError:  # beyond what this norm's scale allows
            continue
        kept.append(radius)
    return kept


def _artifacts(
    model: nn.Module, images: ImageSet, adversarial: Tensor, gallery: int, batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    if not len(adversarial):
        return {}
    x = to_float(images.images[: len(adversarial)])
    with attack_mode(model), torch.no_grad():
        outputs = []
        for part in (x, adversarial):
            if isinstance(model, SplitModel):
                pairs = [model.features_and_logits(chunk.to(device)) for chunk in part.split(batch_size)]
            else:
                pairs = [(logits, logits) for chunk in part.split(batch_size) for logits in [model(chunk.to(device))]]
            outputs.append(tuple(torch.cat([pair[i].float().cpu() for pair in pairs]) for i in (0, 1)))
    (features, logits), (features_adv, logits_adv) = outputs
    g, m = gallery, _MAP_POINTS
    return {
        "x": x[:g],
        "x_adv": adversarial[:g],
        "labels": images.labels[:g],
        "probabilities": logits.softmax(1)[:g],
        "probabilities_adv": logits_adv.softmax(1)[:g],
        "embedding_clean": features[:m],
        "embedding_adv": features_adv[:m],
        "embedding_labels": images.labels[: len(features[:m])].clone(),  # safetensors refuses shared memory
    }


def digest(images: ImageSet) -> str:
    """Return a hex digest of images and labels: records of the same digest can be paired image by image."""
    digest = hashlib.sha256(str((tuple(images.images.shape), images.images.dtype)).encode())
    digest.update(images.images.contiguous().numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:32]
