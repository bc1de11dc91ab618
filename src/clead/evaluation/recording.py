"""The record of what an evaluation has finished, and the tensors that its pictures are drawn from."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clead.evaluation.attacking import OVERFLOW, some
from clead.evaluation.correctness import to_float
from clead.evaluation.plan import MAP_POINTS, EvaluationPlan
from clead.evaluation.state import Part, ResumableResults
from clead.evaluation.suites import NamedAttack, describe
from clead.models.modes import attack_mode
from clead.models.split import SplitModel, weights
from clead.results.provenance import command, environment
from clead.results.record import (
    AttackResult,
    Check,
    ClassAccuracy,
    CurvePoint,
    EvaluatedModel,
    Memory,
    Predictions,
    Record,
    ThreatModel,
)
from clead.results.statistics import balanced, estimate
from clead.settings import Ratio
from clead.tasks import task_name
from clead.weights.files import fingerprint


@dataclass(frozen=True)
class Evaluation:
    """A record, and the tensors that its pictures are drawn from (names as in ``report/run.py``).

    ``adversarial`` holds every image after the last attack on it, in the order of the evaluated images, if it was asked for.
    """

    record: Record
    artifacts: dict[str, Tensor]
    adversarial: Tensor | None = None


def make_evaluation(
    plan: EvaluationPlan,
    store: ResumableResults,
    curve: list[CurvePoint],
    checks: list[Check],
    notes: list[str],
    start: float,
) -> Evaluation:
    """Return the record of a plan whose parts are all in ``store``; ``start``: when the evaluation began, ``time.monotonic``."""
    clean = plan.flags(store, -1)
    attacks, robust, adversarial, targeted_notes = _attacks(plan, store, clean)
    if clean.float().mean() <= 1 / plan.num_classes:
        notes = [
            *notes,
            f"clean accuracy is no better than guessing among {plan.num_classes} classes: are weights and pixels right?",
        ]
    per_class = _per_class(plan, clean, robust)
    record = Record(
        **about(plan, store, notes, [*not_finite(plan, store), *targeted_notes], start),
        clean=estimate(clean.tolist()),
        clean_flags=clean.tolist(),
        worst=estimate(robust.tolist()),
        robust_flags=robust.tolist(),
        attacks=attacks,
        curve=curve,
        checks=checks,
        per_class=per_class,
        balanced=balanced(per_class),
        predictions=_predictions(plan, store),
    )
    artifacts = _artifacts(plan, adversarial[: plan.num_pictures])
    return Evaluation(record, artifacts, adversarial if plan.keep_adversarial else None)


def about(
    plan: EvaluationPlan, store: ResumableResults, notes: list[str], more_notes: list[str], start: float
) -> dict[str, Any]:
    """Return what a record says of model, images, threat and work, whatever the task: its fields but for the figures."""
    eps = Ratio(plan.threat.eps)
    return {
        "run": plan.target.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(),
        "seed": plan.settings.seed,
        "suite": plan.suite,
        "notes": [*notes, *getattr(plan.model, "notes", ()), *more_notes],
        "model": EvaluatedModel(
            name=plan.target.model,
            parameters=sum(p.numel() for key, p in plan.model.named_parameters() if not key.startswith("projection.")),
            weights=plan.target.weights,
            fingerprint=fingerprint(weights(plan.model)),
        ),
        "data": plan.target.evaluated_data(plan.images),
        "threat": ThreatModel(norm=plan.threat.norm, eps=float(eps), eps_text=eps.text),
        "training": plan.target.training,
        "memory": _memory(plan.device),
        "task": task_name(plan.task),
        "versions": environment(),
        # Of an evaluation that was resumed or shared out: the work of all its parts.
        "seconds": max(time.monotonic() - start, sum(data.get("seconds", 0.0) for _, data in store.parts.values())),
    }


def _attacks(
    plan: EvaluationPlan, store: ResumableResults, clean: Tensor
) -> tuple[list[AttackResult], Tensor, Tensor, list[str]]:
    """Return what each attack did, which images are right after all (N,), the saved adversarial images, and notes."""
    robust = clean.clone()
    adversarial = to_float(plan.images.images[: plan.num_saved])
    attacks, notes = [], []
    for stage, named in enumerate(plan.attacks):
        parts, flags = plan.parts(store, stage), plan.flags(store, stage)
        for tensors, _ in parts:
            if "index" in tensors:
                # Where several attacks broke an image, the first is shown; an attack that failed never replaces one that did not.
                shown = robust[tensors["index"]]
                adversarial[tensors["index"][shown]] = tensors["x_adv"][shown]
        before = robust if plan.survivors_only else clean
        if named.target is not None:
            notes.append(_targeted_note(plan.target.classes[named.target], named, (before & ~flags)[before]))
        attacks.append(
            AttackResult(
                name=named.name,
                settings=describe(named),
                attacked=int(before.sum()),
                num_successes=int((before & ~flags).sum()),
                robust=estimate(flags.tolist()),
                flags=flags.tolist(),
                seconds=sum(data["seconds"] for _, data in parts),
                forwards=sum(data["forwards"] for _, data in parts) / len(flags),
                backwards=sum(data["backwards"] for _, data in parts) / len(flags),
                max_distance=max(data["largest"] for _, data in parts),
                lost=lost_images(parts),
            )
        )
        robust = robust & flags
    return attacks, robust, adversarial, notes


def _per_class(plan: EvaluationPlan, clean: Tensor, robust: Tensor) -> list[ClassAccuracy]:
    """Return the accuracies of each class that has images."""
    of_clean, of_robust = (plan.task.metrics(flags, plan.images.labels, plan.num_classes) for flags in (clean, robust))
    return [
        ClassAccuracy(
            name=name,
            n=of_clean["class_n"][k],
            clean_accuracy=of_clean["class_accuracy"][k],
            robust_accuracy=of_robust["class_accuracy"][k],
        )
        for k, name in enumerate(plan.target.classes)
        if of_clean["class_n"][k]
    ]


def _targeted_note(name: str, named: NamedAttack, taken: Tensor) -> str:
    """Return what a targeted attack has reached; ``taken`` says of each attacked image whether it is taken for the class."""
    success = estimate(taken.tolist()) if len(taken) else None
    rate = "" if success is None else f", {success.accuracy:.1%} (95 % interval {success.low:.1%} – {success.high:.1%})"
    return (
        f"{named.name} is targeted: an image counts as broken only where it is taken for {name}, so its accuracy says nothing of "
        f"other mistakes; {int(taken.sum())} of {len(taken)} images that are right when clean are taken for {name}{rate}"
    )


def lost_images(parts: list[Part]) -> list[int]:
    """Return the images at which the gradient of an attack is not finite."""
    return sorted(index for _, data in parts for index in data.get("lost", ()))


def not_finite(plan: EvaluationPlan, store: ResumableResults) -> list[str]:
    """Return notes on the images whose logits, or gradient under an attack, are not finite."""
    notes = []
    if broken := [index for _, data in plan.parts(store, -1) for index in data.get("broken", ())]:
        notes.append(
            f"logits must be finite, got NaN or infinity for images {some(broken)}, which count as wrong; {OVERFLOW}"
        )
    for stage, named in enumerate(plan.attacks):
        if lost := lost_images(plan.parts(store, stage)):
            notes.append(
                f"the gradient of {named.name} is NaN or infinite at images {some(lost)}, which count as not robust; "
                "look for sqrt, log or division at 0 in the model"
            )
    return notes


def _predictions(plan: EvaluationPlan, store: ResumableResults) -> Predictions | None:
    """Return what the images are taken for; None of a randomised model, whose verdict is no single answer."""
    stages = [[tensors for tensors, _ in plan.parts(store, stage)] for stage in range(-1, len(plan.attacks))]
    # A state that an earlier version left does not hold them.
    if plan.draws > 1 or any("predicted" not in tensors for stage in stages for tensors in stage):
        return None
    clean, *attacks = (
        [torch.cat([saved[key] for saved in stage]) for key in ("flags", "predicted")] for stage in stages
    )
    survivors, attacked = clean[0].clone(), clean[1].clone()
    for flags, predicted in attacks:
        attacked = torch.where(survivors & ~flags, predicted, attacked)
        survivors &= flags
    return Predictions(labels=plan.images.labels.tolist(), clean=clean[1].tolist(), attacked=attacked.tolist())


def _memory(device: torch.device) -> Memory:
    """Return the most memory that was in use, as far as the system tells."""
    status = Path("/proc/self/status")  # not getrusage, whose figure a process inherits from the one that started it
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return Memory(
        process=1024 * int(peak[1]) if peak else None,
        device=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _artifacts(plan: EvaluationPlan, adversarial: Tensor) -> dict[str, Tensor]:
    """Return what pictures and maps are drawn of: the first images, clean and adversarial, with answers and features."""
    if not len(adversarial):
        return {}
    model, device, g = plan.model, plan.device, plan.settings.gallery
    x, labels = to_float(plan.images.images[: len(adversarial)]), plan.images.labels
    with attack_mode(model), torch.no_grad():
        outputs = []
        for images in (x, adversarial):
            chunks = (chunk.to(device) for chunk in images.split(plan.batch_size))
            if isinstance(model, SplitModel):
                pairs = [model.features_and_logits(chunk) for chunk in chunks]
            else:
                pairs = [(logits, logits) for chunk in chunks for logits in [model(chunk)]]
            outputs.append(tuple(torch.cat([pair[i].float().cpu() for pair in pairs]) for i in (0, 1)))
    (features, logits), (features_adv, logits_adv) = outputs
    return {
        "x": x[:g],
        "x_adv": adversarial[:g],
        "labels": labels[:g],
        "probabilities": logits.softmax(1)[:g],
        "probabilities_adv": logits_adv.softmax(1)[:g],
        "embedding_clean": features[:MAP_POINTS],
        "embedding_adv": features_adv[:MAP_POINTS],
        "embedding_labels": labels[: len(features[:MAP_POINTS])].clone(),  # safetensors refuses shared memory
    }
