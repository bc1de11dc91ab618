"""What came out, in three lines: what was gained, what it cost, and what limits it, each from a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clead.results.record import Record
from clead.results.statistics import unbalanced

History = Sequence[Mapping[str, Any]]
"""Lines of a run's log, as ``RunDir.history`` gives them."""
Limit = tuple[float, str]
"""What holds a model back: by how much its number is above the one from which on it counts, and a sentence."""
_GAP, _RISE, _RATIO, _WEAK = 0.15, 0.02, 1.5, 0.4
_FEWEST = 10  # images of a class of which something is said
_NEAR = 0.05  # above what a guess gets right, however few images there are


@dataclass(frozen=True)
class Verdict:
    """Three sentences."""

    gained: str
    paid: str
    limit: str

    def lines(self) -> list[str]:
        """Return the three lines as they are printed."""
        return [f"gained: {self.gained}", f"paid: {self.paid}", f"limit: {self.limit}"]


def verdict(baseline: Record, robust: Record, history: History, minutes: float, steps: int = 1) -> Verdict:
    """Return the verdict on a hardened model.

    Args:
        baseline: of the plainly trained model, on the same images.
        robust: of the hardened one.
        history: the log of its training.
        minutes: that its training took.
        steps: of the attack of its training.
    """
    worst, cost = robust.worst, 100 * (baseline.clean.accuracy - robust.clean.accuracy)
    gained = (
        f"{worst.accuracy:.1%} of {worst.n} {robust.data.split} images (95 % interval {worst.low:.1%} – {worst.high:.1%}) "
        f"withstand {robust.threat.norm} {robust.threat.eps_text} under suite {robust.suite}; of the plainly trained model's "
        f"{baseline.worst.accuracy:.1%}"
    )
    if (mean := unbalanced(robust)) is not None:
        gained += f"; as a mean over the classes, which differ in size, {mean.robust.accuracy:.1%}"
    price = (
        "nothing of the"
        if abs(cost) < 0.05
        else f"{cost:.1f} points of"
        if cost > 0
        else f"nothing, {-cost:.1f} points more"
    )
    paid = (
        f"{price} clean accuracy: {robust.clean.accuracy:.1%}, the plainly trained model {baseline.clean.accuracy:.1%}"
    )
    if _guesses(baseline):
        paid = (
            f"not known: the plainly trained model learnt nothing in its part of the time, {baseline.clean.accuracy:.1%} of the "
            f"clean images are right, {robust.clean.accuracy:.1%} of the hardened one's; more --minutes"
        )
    measured = (
        learnt_nothing(robust, baseline),
        weak_attack(history, steps),
        too_few_images(history),
        other_photographs(robust, history),
        too_little_time(history, minutes),
        too_large_eps(robust, baseline),
        weak_class(robust),
    )
    _, limit = max((each for each in measured if each is not None), key=lambda each: each[0], default=(0.0, ""))
    return Verdict(gained, paid, limit or "nothing stands out: more minutes or more images may help")


def learnt_nothing(robust: Record, baseline: Record) -> Limit | None:
    """Look whether the hardened model answers clean images as by a guess: before all else."""
    nor_baseline = _guesses(baseline)
    if not _guesses(robust) or (robust.clean.accuracy >= baseline.clean.accuracy and not nor_baseline):
        return None
    largest = max(each.n for each in robust.per_class) / robust.data.n
    remedy = "try --optim.lr at a third of the recipe's, a smaller --eps, or more --minutes"
    if nor_baseline:
        remedy = "nor did the plainly trained model: look at the images and their classes, and try more --minutes"
    text = (
        f"it learnt nothing: {robust.clean.accuracy:.0%} of the clean images are right, and {largest:.0%} are of the largest "
        f"class; {remedy}"
    )
    return math.inf, text


def _guesses(record: Record) -> bool:
    """Say whether clean images are right no more often than by always answering the largest class, nor as a mean over the classes.

    Where classes are drawn equally often, a model that tells a rare one apart may have fewer right than the largest class has.
    """
    sizes = [each.n for each in record.per_class]
    if len(sizes) < 2:
        return False
    largest, chance = max(sizes) / record.data.n, 1 / len(sizes)
    error = min(_NEAR, 2 * math.sqrt(largest * (1 - largest) / record.data.n))
    error_of_mean = min(_NEAR, 2 * chance * math.sqrt(chance * (1 - chance) * sum(1 / size for size in sizes)))
    mean = _mean([each.clean_accuracy for each in record.per_class])
    return record.clean.accuracy <= largest + error and mean <= chance + error_of_mean


def weak_attack(history: History, steps: int) -> Limit | None:
    """Look whether training and validation are still apart because the attack of the training is weak: before what follows."""
    causes = [line.get("cause") for line in history if line["kind"] == "warning"]
    training, held_out = _robust(history)
    if not causes or causes[-1] != "weak attack" or training - held_out <= _GAP:
        return None
    text = (
        f"the attack of the training is too weak: {training:.0%} of the training images withstand it, {held_out:.0%} of the "
        f"validation images multi-step PGD; try --attack.steps {max(7, 2 * steps)}"
    )
    return math.inf, text


def too_few_images(history: History) -> Limit | None:
    """Compare robust accuracy on the last training batches and on validation images."""
    training, held_out = _robust(history)
    text = (
        f"too few images: {training:.0%} of the training images withstand the attack of the training, {held_out:.0%} of the "
        "validation images theirs; more images will help more than more time"
    )
    return _limit(training - held_out, _GAP, text)


def other_photographs(robust: Record, history: History) -> Limit | None:
    """Compare robust accuracy on validation images, which are a part of the training's, and on test images, under PGD both."""
    points = [point for point in robust.curve if math.isclose(point.eps, robust.threat.eps, rel_tol=1e-3)]
    if robust.data.split != "test" or not points:
        return None
    point, (_, held_out) = points[0], _robust(history)
    text = (
        f"the test images are unlike those of the training: {held_out:.0%} of the validation images, a part of the training's, "
        f"withstand PGD, and {point.robust.accuracy:.0%} of {point.robust.n} test images {point.attack}; photographs of other "
        "people, places and cameras will help more than more of the same, and --data.group_by keeps what belongs together out of "
        "the validation part"
    )
    return _limit(held_out - point.robust.accuracy, _GAP, text)


def too_little_time(history: History, minutes: float) -> Limit | None:
    """Look whether robust validation accuracy still rose in the last fifth of the training."""
    validated = _validated(history)
    if len(validated) < 4:
        return None
    since = 0.8 * validated[-1]["seconds"]
    late = max(line["robust_accuracy"] for line in validated if line["seconds"] >= since)
    rise = late - max((line["robust_accuracy"] for line in validated if line["seconds"] < since), default=late)
    text = (
        f"too little time: robust validation accuracy rose by {100 * rise:.1f} points in the last fifth of {minutes:.0f} minutes "
        f"of training; try --minutes {max(10, round(4 * minutes, -1)):.0f}"
    )
    return _limit(rise, _RISE, text)


def too_large_eps(robust: Record, baseline: Record) -> Limit | None:
    """Look how much more withstands half of the radius, where less than half of what could does the whole one."""
    eps, whole = robust.threat.eps, max(robust.worst.accuracy, 0.01)
    points = [point for point in robust.curve if 0.35 * eps <= point.eps <= 0.65 * eps]
    if not points or whole > 0.5 * baseline.clean.accuracy:
        return None
    point = min(points, key=lambda each: abs(each.eps - eps / 2))
    text = (
        f"eps {robust.threat.eps_text} is large for these images and this time: {point.robust.accuracy:.0%} withstand "
        f"{point.eps_text} under {point.attack}, {robust.worst.accuracy:.0%} the whole; if the smaller one suits your threat, "
        f"try --eps {point.eps_text}"
    )
    return _limit(point.robust.accuracy / whole, _RATIO, text)


def weak_class(robust: Record) -> Limit | None:
    """Look whether one class is far below the others."""
    classes = [each for each in robust.per_class if each.n >= _FEWEST]
    if len(classes) < 2:
        return None
    weakest, mean = (
        min(classes, key=lambda each: each.robust_accuracy),
        _mean([each.robust_accuracy for each in classes]),
    )
    if weakest.robust_accuracy >= _WEAK * mean:
        return None
    text = (
        f"one weak class: {weakest.robust_accuracy:.0%} of {weakest.n} images of {weakest.name} withstand, {mean:.0%} on average "
        "over classes; look at its images and labels, and add more of them"
    )
    return 1 + (1 - weakest.robust_accuracy / (_WEAK * mean)) / 2, text


def _robust(history: History) -> tuple[float, float]:
    """Return robust accuracy on the last training batches and on the validation images; 0 where it was not measured."""
    learnt = [line["robust_accuracy"] for line in history if line["kind"] == "train" and "robust_accuracy" in line]
    validated = _validated(history)
    return (_mean(learnt[-5:]), validated[-1]["robust_accuracy"]) if learnt and validated else (0.0, 0.0)


def _limit(measured: float, least: float, text: str) -> Limit | None:
    return (measured / least, text) if measured > least else None


def _validated(history: History) -> list[Mapping[str, Any]]:
    return [line for line in history if line["kind"] == "validation" and "robust_accuracy" in line]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
