"""One logit: the suites on [0, z] at the threshold, sensitivity and specificity, and the ROC curve in the worst case."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.attacks.runner import finite_images, logits_of, run_attack
from clead.config import Eval
from clead.data.loaders import make_generator
from clead.evaluation.correctness import MicrobatchLimit, batches, exact_float32, run_microbatched
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions, further_state
from clead.evaluation.recording import Evaluation
from clead.evaluation.state import ResumableResults
from clead.evaluation.tasks import EVALUATORS
from clead.interfaces import ImageSet, Threat
from clead.models.split import wrapped
from clead.models.threshold import judged
from clead.results.record import Metric, Record
from clead.results.statistics import estimate
from clead.results.target import EvaluationTarget
from clead.tasks.binary import Binary
from clead.tasks.classification import CLASSIFICATION

_STEPS = 50
_SIDES = (("sensitivity", 1, "positive"), ("specificity", 0, "negative"))


@EVALUATORS.register("binary")
def evaluate(
    model: nn.Module, images: ImageSet, threat: Threat, settings: Eval, target: EvaluationTarget, **options: Any
) -> Evaluation | None:
    """Attack [0, z], as classification is; then sensitivity, specificity, and the scores that the ROC curves are drawn of."""
    task = target.task
    assert isinstance(task, Binary), "this is how the task binary is evaluated"
    model = wrapped(model)
    plain = dataclasses.replace(target, task=CLASSIFICATION)
    evaluation = evaluate_model(judged(model, task), images, threat, settings, plain, **options)
    if evaluation is None:
        return None
    record, given = evaluation.record, options.get("options") or EvaluationOptions()
    device = given.device or next((p.device for p in model.parameters()), torch.device("cpu"))
    state = further_state("scores", model, images, threat, settings, given)
    clean, worst = worst_scores(model, images, threat, settings, device, state)
    worst = broken_scores(worst, record, images.labels, task)
    area = _area(clean, worst, images.labels)
    notes = [*record.notes, *state.notes[1:]]
    if task.threshold != 0.5:
        notes.append(
            f"an image counts as {target.classes[1]} where its probability is above {task.threshold:g}; probabilities under "
            "pictures are moved so that this is at one half"
        )
    changes = {"task": "binary", "metrics": [*_sides(record, images.labels, target), *area], "notes": notes}
    scores = {"score_clean": clean, "score_worst": worst, "score_labels": images.labels.clone()}
    return dataclasses.replace(
        evaluation,
        record=record.model_copy(update=changes),
        artifacts={**evaluation.artifacts, **scores} if area else evaluation.artifacts,
    )


def worst_scores(
    model: nn.Module, images: ImageSet, threat: Threat, settings: Eval, device: torch.device, state: ResumableResults
) -> tuple[Tensor, Tensor]:
    """Return z of each image, (N,), clean, and the worst found in its set: lowest of positives, highest of negatives.

    PGD of 50 steps climbs z or descends it for every image, broken or not: at another threshold others break. Batches
    that ``state`` has are not computed again.
    """
    attack, scores = PGD(steps=settings.steps or _STEPS, keep="best"), []

    def score(x: Tensor, y: Tensor) -> Tensor:
        logits = logits_of(model, x)
        return logits[:, 1] - logits[:, 0]

    limit, size = MicrobatchLimit(), settings.batch_size or 256
    with exact_float32(), torch.inference_mode(False), state.opened():
        for number, (x, y) in enumerate(batches(images, size, device)):
            if (key := f"{number:06d}") in state.parts:
                scores.append(state.parts[key][0])
                continue
            began, generator = time.monotonic(), make_generator(device, settings.seed, -2, number)

            def attacked(x: Tensor, y: Tensor, generator: torch.Generator = generator) -> Tensor:
                return run_attack(attack, model, x, y, threat, objective="margin", generator=generator, checked=True)

            x_adv = run_microbatched(attacked, x, y, limit) if threat.eps else x
            before, after = (run_microbatched(score, each, y, limit) for each in (x, x_adv))
            sign = 1 - 2 * y
            before = torch.where(torch.isfinite(before), before, sign * torch.inf)  # as wrong as can be
            after = torch.where(finite_images(x_adv) & torch.isfinite(after), after, sign * torch.inf)
            worst = sign * torch.maximum(sign * before, sign * after)
            state.save(key, {"clean": before, "worst": worst}, {"seconds": time.monotonic() - began})
            scores.append(state.parts[key][0])
    return torch.cat([each["clean"] for each in scores]), torch.cat([each["worst"] for each in scores])


def broken_scores(worst: Tensor, record: Record, labels: Tensor, task: Binary) -> Tensor:
    """Return the worst scores, on the wrong side of the threshold wherever the suite broke an image."""
    broken = ~torch.tensor(record.robust_flags)
    shift = torch.tensor(task.shift, dtype=worst.dtype)
    above = torch.nextafter(shift, shift.new_tensor(math.inf))  # at the threshold the answer is negative
    side = torch.where(labels == 1, torch.minimum(worst, shift), torch.maximum(worst, above))
    return torch.where(broken, side, worst)


def _sides(record: Record, labels: Tensor, target: EvaluationTarget) -> list[Metric]:
    """Return sensitivity and specificity, of the classes that have images."""
    metrics = []
    for name, side, word in _SIDES:
        flags = [torch.tensor(each)[labels == side].tolist() for each in (record.clean_flags, record.robust_flags)]
        if not flags[0]:
            continue
        clean, robust = map(estimate, flags)
        metrics.append(
            Metric(
                name=name,
                about=f"part of the {clean.n} {word} images (class {target.classes[side]}) that are taken for {word}",
                n=clean.n,
                clean=clean.accuracy,
                robust=robust.accuracy,
                clean_interval=(clean.low, clean.high),
                robust_interval=(robust.low, robust.high),
            )
        )
    return metrics


def _area(clean: Tensor, worst: Tensor, labels: Tensor) -> list[Metric]:
    """Return the area under both ROC curves; nothing where a class has no image."""
    from scipy.stats import mannwhitneyu

    pairs = [(scores[labels == 1].numpy(), scores[labels == 0].numpy()) for scores in (clean, worst)]
    if not len(pairs[0][0]) or not len(pairs[0][1]):
        return []
    areas = [float(mannwhitneyu(*pair).statistic) / (len(pair[0]) * len(pair[1])) for pair in pairs]
    about = (
        "area under the ROC curve: how often a positive image scores above a negative one, each attacked by itself in the worst "
        "case; an upper bound, as robust accuracy is"
    )
    return [Metric(name="ROC area", about=about, n=len(labels), clean=areas[0], robust=areas[1])]
