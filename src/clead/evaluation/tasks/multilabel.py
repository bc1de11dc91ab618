"""Several labels: the suite on each label by itself, one perturbation against all of them, and robust mean average precision."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.attacks.runner import finite_images, run_attack, verified
from clead.config import Eval
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import MicrobatchLimit, batches, exact_float32, run_microbatched
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions, further_state
from clead.evaluation.recording import Evaluation
from clead.evaluation.state import CONTINUED, Part, ResumableResults
from clead.evaluation.suites import NamedAttack, describe
from clead.evaluation.tasks import EVALUATORS
from clead.evaluation.tasks.binary import broken_scores, worst_scores
from clead.interfaces import ImageSet, Threat
from clead.models.modes import attack_mode
from clead.models.one_label import OneLabel
from clead.models.split import wrapped
from clead.results.record import AttackResult, ClassAccuracy, Metric, Record
from clead.results.statistics import estimate
from clead.results.target import EvaluationTarget
from clead.tasks.binary import Binary
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.multilabel import UNKNOWN, MultiLabel
from clead.tasks.retrieval import average_precision

_STEPS = 50
JOINT = (("PGD, all labels at once", "cross_entropy"), ("PGD, nearest label", "margin"))
"""One perturbation against all labels of an image: on the sum of their losses, and on the label that is nearest to being wrong."""


@dataclasses.dataclass(frozen=True)
class _Label:
    """What the evaluation of one label measured: its record, which images it is of, which have it, and their z, clean and worst."""

    record: Record
    rows: Tensor
    present: Tensor
    clean: Tensor
    worst: Tensor


@EVALUATORS.register("multilabel")
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
) -> Evaluation:
    """Attack each label by itself, as the two logits [0, z], on the images of which it is known; then all labels at once.

    An image is robust if no attack turns any of its known labels: for that, attacks on one label after another are the worst case.
    """
    start, options = time.monotonic(), options or EvaluationOptions()
    if more or options.shard is not None or options.merge or options.keep_adversarial:
        raise UserError(
            "the task multilabel is evaluated in one piece, with several adversarial images for each image; leave out --shard, "
            "--merge, --save-adversarial and --transfer-from"
        )
    model = wrapped(model)
    device = options.device or next((p.device for p in model.parameters()), torch.device("cpu"))
    labels, number = images.labels, len(images.labels)
    state = further_state("joint", model, images, threat, settings, options)
    joint = (
        {} if attacks is not None else _all_at_once(model, images, threat, settings, device, state)
    )  # refuses a wrong model
    measured = _each_label(model, images, threat, settings, target, attacks=attacks, options=options)
    known = labels != UNKNOWN
    clean, robust = ~known, ~known  # (N, L): what is unknown breaks nothing
    for k, label in measured.items():
        clean[label.rows, k] = torch.tensor(label.record.clean_flags)
        robust[label.rows, k] = torch.tensor(label.record.robust_flags)
    together = torch.stack([clean, *(right for right, _ in joint.values())]).int()
    for right, _ in joint.values():
        robust &= right | ~known
    first = next(iter(measured.values())).record
    curve = [
        point.model_copy(update={"attack": f"{point.attack}, {_first(measured, target)}"}) for point in first.curve
    ]
    checks = [check.model_copy(update={"name": f"{check.name} ({_first(measured, target)})"}) for check in first.checks]
    more_notes = dict.fromkeys(note for each in measured.values() for note in (*each.record.notes, *state.notes))
    notes = [*first.notes, *(note for note in more_notes if note not in first.notes and not note.startswith(CONTINUED))]
    notes += [f"each of {len(measured)} labels is attacked by itself; {target.task.describe()}"]
    if settings.gallery:
        notes.append(
            "no pictures: an image has an adversarial one for each label (clead attack RUN --target LABEL makes those of one)"
        )
    if curve or checks:
        notes.append(f"the curve and the checks of gradient masking are of the label {_first(measured, target)} alone")
    record = first.model_copy(
        update={
            "run": target.name,
            "task": "multilabel",
            "data": target.evaluated_data(images),
            "clean": estimate(clean.all(1).tolist()),
            "clean_flags": clean.all(1).tolist(),
            "worst": estimate(robust.all(1).tolist()),
            "robust_flags": robust.all(1).tolist(),
            "attacks": [*_attacks(measured, number), *(each for _, each in joint.values())],
            "per_class": _per_label(measured, clean, robust, target),
            "metrics": _metrics(measured, clean & known, robust & known, (together, known), bool(joint)),
            "curve": curve,
            "checks": checks,
            "notes": notes,
            "balanced": None,
            "predictions": None,
            "seconds": max(
                time.monotonic() - start, sum(each.record.seconds for each in measured.values()) + state.seconds
            ),
        }
    )
    return Evaluation(record, {})


def _first(measured: dict[int, _Label], target: EvaluationTarget) -> str:
    return target.classes[next(iter(measured))]


def _each_label(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    target: EvaluationTarget,
    *,
    attacks: Sequence[NamedAttack] | None,
    options: EvaluationOptions,
) -> dict[int, _Label]:
    """Evaluate the model on each label of which an image is known; each keeps a state of its own."""
    measured = {}
    for k, name in enumerate(target.classes):
        rows = (images.labels[:, k] != UNKNOWN).nonzero()[:, 0]
        if not len(rows):
            continue
        of_label = images.subset(rows)
        of_label = dataclasses.replace(of_label, labels=of_label.labels[:, k].contiguous())
        # What is drawn once is drawn of the first label.
        plain = {"gallery": 0} if not measured else {"gallery": 0, "curve_points": 0, "check_images": 0}
        chosen = dataclasses.replace(settings, **plain)
        about = dataclasses.replace(
            target, name=f"{target.name}, {name}", classes=(f"no {name}", name), task=CLASSIFICATION
        )
        state = None if options.state is None else options.state / f"label-{k:04d}"
        judged, device = (
            OneLabel(model, k),
            options.device or next((p.device for p in model.parameters()), torch.device("cpu")),
        )
        evaluation = evaluate_model(
            *(judged, of_label, threat, chosen, about),
            attacks=attacks,
            options=dataclasses.replace(options, state=state),
        )
        assert evaluation is not None, "there are no shards"
        scores = further_state("scores", judged, of_label, threat, settings, dataclasses.replace(options, state=state))
        clean, worst = worst_scores(judged, of_label, threat, settings, device, scores)
        worst = broken_scores(worst, evaluation.record, of_label.labels, Binary())
        measured[k] = _Label(evaluation.record, rows, of_label.labels == 1, clean, worst)
    return measured


def _all_at_once(
    model: nn.Module, images: ImageSet, threat: Threat, settings: Eval, device: torch.device, state: ResumableResults
) -> dict[str, tuple[Tensor, AttackResult]]:
    """Return for each attack on all labels which labels are right after it, (N, L), and what the record says of it.

    Batches that ``state`` has are not computed again.
    """
    attack, limit = PGD(steps=settings.steps or _STEPS, keep="best"), MicrobatchLimit()
    size, results = settings.batch_size or 256, {}
    with exact_float32(), torch.inference_mode(False), state.opened():
        for stage, (name, objective) in enumerate(JOINT):
            parts = []
            for number, (x, y) in enumerate(batches(images, size, device)):
                if (key := f"{number:06d}-{stage}") not in state.parts:
                    generator = make_generator(device, settings.seed, -3 - stage, number)
                    state.save(
                        key,
                        *_one_perturbation(NamedAttack(name, attack, objective), model, x, y, threat, limit, generator),
                    )
                parts.append(state.parts[key])
            exact = torch.cat([tensors["exact"] for tensors, _ in parts])
            results[name] = (
                torch.cat([tensors["right"] for tensors, _ in parts]),
                AttackResult(
                    name=name,
                    settings=describe(NamedAttack(name, attack, objective)),
                    attacked=len(images.labels),
                    num_successes=int((~exact).sum()),
                    robust=estimate(exact.tolist()),
                    flags=exact.tolist(),
                    seconds=sum(data["seconds"] for _, data in parts),
                    forwards=float(attack.steps),
                    backwards=float(attack.steps),
                    max_distance=max(data["largest"] for _, data in parts),
                    lost=[number * size + k for number, (_, data) in enumerate(parts) for k in data["lost"]],
                ),
            )
    return results


def _one_perturbation(
    named: NamedAttack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    limit: MicrobatchLimit,
    generator: torch.Generator,
) -> Part:
    """Return which labels of a batch are right after an attack on all of them, (B, L), and which images have all right, (B,)."""
    task, began = MultiLabel(), time.monotonic()

    def right(x: Tensor, y: Tensor) -> Tensor:
        with attack_mode(model), torch.no_grad():
            logits = model(x)
        task.check(logits, y)
        return task.right(logits, y) & finite_images(x)[:, None]

    def attacked(x: Tensor, y: Tensor) -> Tensor:
        how: dict[str, Any] = {"objective": named.objective, "task": task, "generator": generator, "checked": True}
        return run_attack(named.attack, model, x, y, threat, **how)

    clean = run_microbatched(right, x, y, limit)
    x_adv = verified(run_microbatched(attacked, x, y, limit), x, threat, named.name)
    finite = finite_images(x_adv)
    after = clean & run_microbatched(
        right, x_adv, y, limit
    )  # a label that is wrong before counts as it was, mended or not
    return {"right": after, "exact": (after | (y == UNKNOWN)).all(1)}, {
        "seconds": time.monotonic() - began,
        "largest": threat.distance((x_adv - x)[finite]).max().item() if finite.any() else 0.0,
        "lost": (~finite).nonzero()[:, 0].tolist(),
    }


def _attacks(measured: dict[int, _Label], number: int) -> list[AttackResult]:
    """Return each attack of the suite on every label: ``flags`` say which images have all labels right after it."""
    results = []
    for stage, one in enumerate(next(iter(measured.values())).record.attacks):
        flags = torch.ones(number, dtype=torch.bool)
        parts = [(label, label.record.attacks[stage]) for label in measured.values()]
        for label, each in parts:
            flags[label.rows] &= torch.tensor(each.flags)
        weights = [len(label.rows) / number for label, _ in parts]
        results.append(
            one.model_copy(
                update={
                    "name": f"{one.name}, on each label",
                    "attacked": sum(each.attacked for _, each in parts),
                    "num_successes": sum(each.num_successes for _, each in parts),
                    "robust": estimate(flags.tolist()),
                    "flags": flags.tolist(),
                    "seconds": sum(each.seconds for _, each in parts),
                    "forwards": sum(w * each.forwards for w, (_, each) in zip(weights, parts, strict=True)),
                    "backwards": sum(w * each.backwards for w, (_, each) in zip(weights, parts, strict=True)),
                    "max_distance": max(each.max_distance for _, each in parts),
                    "lost": sorted({int(label.rows[k]) for label, each in parts for k in each.lost}),
                }
            )
        )
    return results


def _per_label(
    measured: dict[int, _Label], clean: Tensor, robust: Tensor, target: EvaluationTarget
) -> list[ClassAccuracy]:
    """Return how many of the images of which a label is known have it right, clean and in its own worst case."""
    return [
        ClassAccuracy(
            name=target.classes[k],
            n=len(label.rows),
            clean_accuracy=clean[label.rows, k].double().mean().item(),
            robust_accuracy=robust[label.rows, k].double().mean().item(),
        )
        for k, label in measured.items()
    ]


def _metrics(
    measured: dict[int, _Label], clean: Tensor, robust: Tensor, joint: tuple[Tensor, Tensor], attacked: bool
) -> list[Metric]:
    """Return the part of labels that are right, each attacked by itself and all by one perturbation, and both mean precisions."""
    together, known = joint
    cases = int(known.sum())
    share = int(clean.sum()) / cases
    metrics = [
        Metric(
            name="labels right, each attacked by itself",
            about=f"part of the {cases} known labels of all images that are right; in the worst case each has its own attack",
            n=cases,
            clean=share,
            robust=int(robust.sum()) / cases,
        )
    ]
    if attacked:
        fewest = (together.bool() & known).sum(2).amin(0)
        metrics.append(
            Metric(
                name="labels right, one perturbation",
                about="the same where one perturbation of the image turns as many of its labels as it can; an upper bound",
                n=cases,
                clean=share,
                robust=int(fewest.sum()) / cases,
            )
        )
    pairs = []
    for label in measured.values():
        if label.present.any() and not label.present.all():
            scores = (label.clean, label.worst)
            pairs.append([average_precision(z[None], label.present[None]).item() for z in scores])
    if pairs:
        clean_mean, worst_mean = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        about = (
            f"mean over the {len(pairs)} labels that some images have and some have not of the average precision of their scores; "
            "in the worst case every image is attacked by itself, down where it has the label and up where it has not"
        )
        metrics.append(
            Metric(name="mean average precision", about=about, n=len(pairs), clean=clean_mean, robust=worst_mean)
        )
    return metrics
