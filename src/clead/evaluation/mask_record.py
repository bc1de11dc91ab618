"""The record of masks under attack, from the finished parts of an evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clead.attacks.runner import logits_of
from clead.evaluation.correctness import run_microbatched, to_float
from clead.evaluation.objects import BOUNDS, SIZES
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.recording import Evaluation, about, lost_images, not_finite
from clead.evaluation.state import ResumableResults
from clead.evaluation.suites import describe
from clead.losses.pixels import VOID
from clead.results.masks import (
    Counts,
    bootstrap,
    class_iou,
    counts_text,
    lowest_accuracy,
    lowest_mean_iou,
    mean_iou,
    pixel_accuracy,
)
from clead.results.record import (
    AttackResult,
    Check,
    ClassIou,
    CurvePoint,
    Estimate,
    MaskResult,
    Metric,
    Record,
)
from clead.tasks.segmentation import SEGMENTATION

MIOU = "mIoU"


def mask_evaluation(
    plan: EvaluationPlan,
    store: ResumableResults,
    curve: list[CurvePoint],
    checks: list[Check],
    notes: list[str],
    start: float,
) -> Evaluation:
    """Return the record of a plan whose parts are all in ``store``; the clean image is a candidate of the worst case, too."""
    stages = range(-1, len(plan.attacks))
    each = [torch.cat([tensors["counts"] for tensors, _ in plan.parts(store, stage)]) for stage in stages]
    counts = Counts(*torch.stack(each, 1).movedim(2, 0).numpy())
    objects = torch.stack(
        [torch.cat([saved["objects"] for saved, _ in plan.parts(store, stage)]) for stage in stages], 1
    )
    n, seed = len(plan.images), plan.settings.seed
    clean, fewest, chosen = np.zeros(n, np.int64), lowest_accuracy(counts), lowest_mean_iou(counts)
    accuracy = {"clean": counts.chosen(clean), "robust": counts.chosen(fewest), "miou": counts.chosen(chosen)}
    record = Record(
        **about(plan, store, notes, not_finite(plan, store), start),
        clean=estimate_pixels(accuracy["clean"], seed),
        clean_flags=[],
        worst=estimate_pixels(accuracy["robust"], seed),
        robust_flags=[],
        attacks=_attacks(plan, store, counts),
        curve=curve,
        checks=checks,
        per_class=[],
        metrics=[_miou(accuracy["clean"], accuracy["miou"], seed), *_objects(objects.numpy(), chosen)],
        masks=MaskResult(
            size=tuple(plan.images.labels.shape[1:]),
            void=int((plan.images.labels == VOID).sum()),
            attack_miou=[_single(counts, stage + 1) for stage in range(len(plan.attacks))],
            classes=_classes(plan, accuracy["clean"], accuracy["miou"]),
            clean=counts_text(accuracy["clean"]),
            lowest_accuracy=counts_text(accuracy["robust"]),
            lowest_miou=counts_text(accuracy["miou"]),
        ),
    )
    adversarial, order = _adversarial(plan, store, pixel_accuracy(accuracy["robust"]))
    artifacts = _artifacts(plan, adversarial, order)
    return Evaluation(record, artifacts)


def estimate_pixels(counts: Counts, seed: int) -> Estimate:
    """Return the share of right pixels of counts (N, K), with its bootstrap interval over images."""
    value, low, high = bootstrap(counts, "pixel_accuracy", seed)
    return Estimate(accuracy=value, low=low, high=high, n=len(counts.hit))


def _single(counts: Counts, candidate: int) -> float:
    """Return the mIoU under one attack alone."""
    return float(mean_iou(counts.chosen(np.full(len(counts.hit), candidate)).total()))


def _attacks(plan: EvaluationPlan, store: ResumableResults, counts: Counts) -> list[AttackResult]:
    """Return what each attack did by itself; a success is an image that it takes right pixels from."""
    clean, results = counts.hit[:, 0].sum(-1), []
    for stage, named in enumerate(plan.attacks):
        parts = plan.parts(store, stage)
        alone = counts.chosen(np.full(len(clean), stage + 1))
        results.append(
            AttackResult(
                name=named.name,
                settings=describe(named),
                attacked=len(clean),
                num_successes=int((alone.hit.sum(-1) < clean).sum()),
                robust=estimate_pixels(alone, plan.settings.seed),
                flags=[],
                seconds=sum(data["seconds"] for _, data in parts),
                forwards=sum(data["forwards"] for _, data in parts) / len(clean),
                backwards=sum(data["backwards"] for _, data in parts) / len(clean),
                max_distance=max(data["largest"] for _, data in parts),
                lost=lost_images(parts),
            )
        )
    return results


def _miou(clean: Counts, robust: Counts, seed: int) -> Metric:
    values = [bootstrap(counts, "mean_iou", seed) for counts in (clean, robust)]
    classes = [int((~np.isnan(class_iou(counts.total()))).sum()) for counts in (clean, robust)]
    return Metric(
        name=MIOU,
        about=f"mean of the intersection over union of the classes in a mask or an answer, {classes[0]} classes clean and "
        f"{classes[1]} attacked; attacks are chosen per image so that it is low",
        n=len(clean.hit),
        clean=values[0].value,
        robust=values[1].value,
        clean_interval=values[0][1:],
        robust_interval=values[1][1:],
    )


def _objects(objects: np.ndarray, choice: np.ndarray) -> list[Metric]:
    """Return the mean IoU of the objects of each size there is; ``objects`` (N, C, 3, 2), ``choice`` of a candidate (N,)."""
    limits = {
        "small": f"below {BOUNDS[0]:.1%}",
        "medium": f"{BOUNDS[0]:.1%} to {BOUNDS[1]:.0%}",
        "large": f"{BOUNDS[1]:.0%} and more",
    }
    totals = [objects[np.arange(len(choice)), each].sum(0) for each in (np.zeros_like(choice), choice)]
    return [
        Metric(
            name=f"IoU of {size} objects",
            about=f"mean IoU of the connected parts of a class that take {limits[size]} of the image; attacked: on the images "
            "chosen for a low mIoU",
            n=int(totals[0][k, 0]),
            clean=float(totals[0][k, 1] / totals[0][k, 0]),
            robust=float(totals[1][k, 1] / totals[1][k, 0]),
        )
        for k, size in enumerate(SIZES)
        if totals[0][k, 0]
    ]


def _classes(plan: EvaluationPlan, clean: Counts, robust: Counts) -> list[ClassIou]:
    pixels = clean.total().true
    pairs = zip(class_iou(clean.total()), class_iou(robust.total()), strict=True)
    values = [[None if np.isnan(value) else float(value) for value in pair] for pair in pairs]
    return [
        ClassIou(name=name, pixels=int(pixels[k]), clean=values[k][0], robust=values[k][1])
        for k, name in enumerate(plan.target.classes)
    ]


def _adversarial(
    plan: EvaluationPlan, store: ResumableResults, accuracy: np.ndarray
) -> tuple[dict[int, Tensor], list[int]]:
    """Return the image of the fewest right pixels of those that were kept, and the numbers of the worst images, worst first."""
    images = {
        int(number): image
        for stage in range(len(plan.attacks))  # a later attack kept what it lowered further
        for tensors, _ in plan.parts(store, stage)
        for number, image in zip(tensors["index"], tensors["x_adv"], strict=True)
    }
    order = np.argsort(accuracy, kind="stable")[: plan.settings.gallery].tolist()
    return images, order


def _artifacts(plan: EvaluationPlan, adversarial: dict[int, Tensor], order: list[int]) -> dict[str, Tensor]:
    """Return what pictures are drawn of, worst images first: images, masks, and answers clean and adversarial."""
    if not order:
        return {}
    index = torch.tensor(order)
    chosen = plan.images.subset(index)
    x, y = to_float(chosen.images), chosen.labels
    x_adv = torch.stack([adversarial.get(number, x[k]) for k, number in enumerate(order)])

    def answers(images: Tensor) -> Tensor:
        images, masks = images.to(plan.device), y.to(plan.device)
        return run_microbatched(
            lambda x, y: SEGMENTATION.answers(logits_of(plan.model, x), y), images, masks, plan.microbatch
        )

    return {
        "index": index,
        "x": x,
        "x_adv": x_adv,
        "labels": y.to(torch.uint8),
        "predicted": answers(x).to("cpu", torch.uint8),
        "predicted_adv": answers(x_adv).to("cpu", torch.uint8),
    }
