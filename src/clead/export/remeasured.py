"""Clean and robust accuracy once more, of a model whose numbers were rounded."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from clead.config import Eval, RunConfig
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.export.onnx import StraightThrough
from clead.interfaces import ImageSet
from clead.models.threshold import judged
from clead.results.record import Estimate, RecordModel
from clead.results.statistics import estimate
from clead.results.target import EvaluationTarget
from clead.settings import validated
from clead.tasks.binary import Binary
from clead.tasks.classification import CLASSIFICATION

QUERY_STEPS = 20
"""Fifty queries each: Square gets a thousand, a fifth of what it has in AutoAttack."""


class Remeasured(RecordModel):
    """What the conversion left, on the same n images, each accuracy with its Wilson 95 % interval.

    ``before`` and ``white_box`` are worst cases under the quick suite, which is not AutoAttack: of the original, and of the
    converted model itself, attacked through its own gradients or, where it has none, the original's (``gradients`` says which).
    ``transferred``: the images that were made for the original. ``queries``: Square with a thousand queries. ``worst`` is per image
    over all three.
    """

    precision: str
    images: str
    gradients: str
    clean_before: Estimate
    before: Estimate
    clean: Estimate
    transferred: Estimate
    white_box: Estimate
    queries: Estimate
    worst: Estimate


def remeasure(
    original: nn.Module,
    converted: nn.Module,
    images: ImageSet,
    config: RunConfig,
    target: EvaluationTarget,
    *,
    precision: str,
    gradients: bool,
    show: bool = True,
) -> Remeasured:
    """Attack ``original`` and ``converted`` on the same images.

    Args:
        original: x, (B, C, H, W) float in [0, 1] -> logits (B, K).
        converted: what was made of it.
        images: n images and labels.
        config: threat, and seed of the attacks.
        target: names for the progress.
        precision: what the numbers were rounded to, for the result.
        gradients: whether ``converted`` has gradients of its own.
        show: show progress on stderr.
    """
    options = {"check_images": 0, "curve_points": 0, "gallery": 0, "seed": config.eval.seed}
    original, converted = (judged(model, target.task) for model in (original, converted))
    if isinstance(target.task, Binary):
        target = dataclasses.replace(target, task=CLASSIFICATION)
    quick = validated(Eval, {**options, "suite": "quick"})
    queries = validated(Eval, {**options, "suite": "black_box", "steps": QUERY_STEPS})
    attacked = converted if gradients else StraightThrough(original, converted)
    threat, plain = config.threat, EvaluationOptions(show=show)
    keep = EvaluationOptions(show=show, keep_adversarial=True)
    before = evaluate_model(original, images, threat, quick, target, options=keep)
    inside = evaluate_model(attacked, images, threat, quick, target, options=plain)
    outside = evaluate_model(converted, images, threat, queries, target, options=plain)
    assert before is not None and inside is not None and outside is not None and before.adversarial is not None
    with exact_float32():
        pairs = zip(before.adversarial.split(256), images.labels.split(256), strict=True)
        stands = torch.cat([correct_mask(converted, x, y) for x, y in pairs])
        pairs = zip(images.images.split(256), images.labels.split(256), strict=True)
        clean = torch.cat([correct_mask(converted, to_float(x), y) for x, y in pairs])
    flags = [clean & stands, *(torch.tensor(evaluation.record.robust_flags) for evaluation in (inside, outside))]
    return Remeasured(
        precision=precision,
        images=before.record.data.images,
        gradients="its own" if gradients else "those of the original in place of the rounding's (BPDA)",
        clean_before=before.record.clean,
        before=before.record.worst,
        clean=estimate(clean.tolist()),
        transferred=estimate(flags[0].tolist()),
        white_box=inside.record.worst,
        queries=outside.record.worst,
        worst=estimate((flags[0] & flags[1] & flags[2]).tolist()),
    )
