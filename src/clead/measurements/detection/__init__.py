"""Tell adversarial images from clean ones by a model's features, and attack the model and its detector together.

A detector that is tested only against attacks which do not know it says nothing: Carlini & Wagner 2017 (arXiv:1705.07263) broke
ten. So every figure here comes twice, against attacks on the classifier alone (oblivious) and against one that knows the detector
and its threshold (aware).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import nn

from clead.attacks.pgd import PGD
from clead.data.base import stratified
from clead.errors import UserError, did_you_mean
from clead.evaluation.correctness import exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import Attack, ImageSet, Search, Threat
from clead.measurements import MEASUREMENTS
from clead.measurements.base import Computation, Measurement, MeasurementTarget
from clead.measurements.detection.detectors import (
    DETECTORS,
    Detector,
    Disagreement,
    Mahalanobis,
    NearestNeighbours,
)
from clead.measurements.detection.plan import AttackedImages, CleanImages, DetectionPlan
from clead.measurements.detection.result import Detection, DetectionPoint
from clead.measurements.detection.separation import auroc, fpr_at_tpr, threshold_at
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.progress import progress
from clead.results.statistics import estimate
from clead.settings import Ratio, setting, settings

__all__ = [
    "DETECTORS",
    "RATES",
    "Detection",
    "DetectionProtocol",
    "DetectionMeasurement",
    "DetectionPoint",
    "Detector",
    "Disagreement",
    "Mahalanobis",
    "NearestNeighbours",
    "auroc",
    "evaluate_detection",
    "fpr_at_tpr",
    "threshold_at",
]

RATES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Fractions of the clean images that a detector may reject; each has its threshold, and its own aware attack."""
NamedAttacks = Sequence[tuple[str, Attack | Search, str]]


@MEASUREMENTS.register("detect")
@settings
class DetectionMeasurement(Measurement):
    """Attack runs and detectors of attacks together: ``clead detect RUN ... [--eval.images 300, the default]``.

    Detectors are fitted on the training images that have a label, their thresholds set on the validation images, both clean.
    Each test image is attacked in ``--eval.steps`` steps, 100 if not given, once per threshold of each detector.
    """

    result: ClassVar = Detection
    keys: ClassVar = ("threat", "eval.steps", "eval.batch_size")
    images: ClassVar = 300
    steps: ClassVar = 100
    validation_images: ClassVar[str] = "set the detectors' thresholds"

    detectors: tuple[str, ...] = setting(tuple(DETECTORS), f"Which, with commas: {', '.join(DETECTORS)}.")
    restarts: int = setting(3, "Restarts of the attack that knows the detector.")

    @field_validator("detectors")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in DETECTORS:
                raise UserError(f"unknown detector {name!r}; {did_you_mean(name, DETECTORS)}")
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"name each detector once, at least one of {', '.join(DETECTORS)}, got {', '.join(names) or 'none'}; "
                "take out the repeated"
            )
        return names

    def run(self, target: MeasurementTarget, state: ResumableResults) -> Detection:
        """Fit, set thresholds, attack."""
        return evaluate_detection(
            target.model,
            target.splits.train.labelled_subset(),
            target.images,
            target.threat,
            DetectionProtocol(
                [DETECTORS[name]() for name in self.detectors], None, RATES, target.steps or 100, self.restarts
            ),
            target.computation(state),
            calibration=target.splits.val,
        )


@dataclass(frozen=True)
class DetectionProtocol:
    """Which detectors meet which attacks.

    Attributes:
        detectors: None: ``Mahalanobis``, ``NearestNeighbours`` and ``Disagreement`` with their defaults.
        attacks: the oblivious ones, each (name, attack, objective); None: PGD of ``steps`` with cross-entropy and with the margin.
        rates: clean rejection rates in [0, 1).
        steps: of the aware attack, per threshold, strategy and restart.
        restarts: of the aware attack; the first starts at the best point so far, the others at random points, each towards another
            class, the most likely first.
    """

    detectors: Sequence[Detector] | None = None
    attacks: NamedAttacks | None = None
    rates: Sequence[float] = RATES
    steps: int = 100
    restarts: int = 3


def evaluate_detection(
    model: nn.Module,
    reference: ImageSet,
    images: ImageSet,
    threat: Threat,
    protocol: DetectionProtocol | None = None,
    how: Computation | None = None,
    *,
    calibration: ImageSet | None = None,
) -> Detection:
    """Fit detectors on clean images and measure them against attacks that do not, and that do, know them.

    Detectors and thresholds see clean images only. Per detector and image the smallest score of any misclassified image found in
    the threat set is kept: the image is lost at every threshold from there on. The aware attack runs at each threshold anew, from
    the best point so far and from random ones, so that the curve has no point that was not attacked; it includes what the oblivious
    attacks found. So the figures are upper bounds, as every robust accuracy is.

    Args:
        model: a ``SplitModel``, whose features are used; left bit-identical.
        reference: clean images, with their labels, on which detectors are fitted: training images.
        images: what to attack; all of them.
        threat: norm and radius.
        protocol: detectors, attacks, thresholds.
        how: batch size, seed of the random starts and of the halves, device; its state has finished batches of each attack.
        calibration: other clean images that set the thresholds, such as the validation images; None: half of ``reference`` is kept
            back for it, since an image is its own neighbour.

    Raises UserError if the model has no features, on invalid images, and on values out of range.
    """
    if not isinstance(model, SplitModel):
        raise UserError(
            f"detection needs a model split into features and classifier, got a {type(model).__name__}; "
            "wrap it with clead.adapt(model, sample_shape=(C, H, W))"
        )
    protocol, how = protocol or DetectionProtocol(), how or Computation()
    rates, steps = sorted(set(protocol.rates)), protocol.steps
    _check(rates, steps=steps, restarts=protocol.restarts, batch_size=how.batch_size)
    if calibration is None:
        first, second = stratified(reference.labels, len(reference) // 2, how.seed)
        reference, calibration = reference.subset(first), reference.subset(second)
    detectors = [kind() for kind in DETECTORS.values()] if protocol.detectors is None else list(protocol.detectors)
    attacks = protocol.attacks
    if attacks is None:
        pgd = PGD(steps=steps, keep="best")
        attacks = [(f"PGD-{steps} {name}", pgd, name) for name in ("cross_entropy", "margin")]

    images = ImageSet(to_float(images.images), images.labels)
    how = replace(how, device=how.device_of(model))
    plan = DetectionPlan(model, threat, images, how, steps, protocol.restarts)
    with exact_float32(), attack_mode(model):
        plan.fit(detectors, reference)
        calibrated = plan.look(detectors, calibration)[2]
        clean = CleanImages(*plan.look(detectors, images))
    total = len(images) * (len(attacks) + len(detectors) * len(rates))
    with how.state.opened(), exact_float32(), attack_mode(model), progress("detect", total, show=how.show) as tick:
        oblivious = [
            plan.oblivious(number, attack, clean.wrong, detectors, tick) for number, attack in enumerate(attacks)
        ]
        results = [
            plan.measure(d, detector, calibrated[d], clean, oblivious, rates, tick)
            for d, detector in enumerate(detectors)
        ]
    return _summary(plan, clean, oblivious, fitted=len(reference), calibrated=len(calibration), detectors=results)


def _summary(plan: DetectionPlan, clean: CleanImages, oblivious: Sequence[AttackedImages], **figures: Any) -> Detection:
    broken = torch.stack([clean.wrong, *(each.wrong for each in oblivious)]).any(0)
    eps = Ratio(plan.threat.eps)
    return Detection(
        images=len(plan.images),
        norm=plan.threat.norm,
        eps=float(eps),
        eps_text=eps.text,
        steps=plan.steps,
        restarts=plan.restarts,
        seed=plan.how.seed,
        clean=estimate((~clean.wrong).tolist()),
        robust=estimate((~broken).tolist()),
        seconds=plan.how.seconds,
        **figures,
    )


def _check(rates: Sequence[float], **counts: int) -> None:
    if not rates or not all(0 <= rate < 1 for rate in rates):
        raise UserError(
            f"rates must be one or more clean rejection rates in [0, 1), got {rates}; give rates=[0.01, 0.05]"
        )
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; give {name}=1 or more")
