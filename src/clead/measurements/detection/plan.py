"""The parts of one measurement of detectors: fit them, look at clean images, attack without and with knowledge of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

from clead.attacks.runner import check_inputs, run_attack, verified
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import to_float
from clead.interfaces import Attack, ImageSet, Search, Threat
from clead.losses.margin import margin
from clead.measurements.base import Computation
from clead.measurements.detection.attack import STRATEGIES, Evasion, evaded
from clead.measurements.detection.detectors import Detector
from clead.measurements.detection.result import DetectedAttack, DetectionPoint, DetectorResult
from clead.measurements.detection.separation import auroc, fpr_at_tpr, threshold_at
from clead.models.split import SplitModel
from clead.progress import Tick
from clead.results.statistics import estimate
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import per_image


@dataclass(frozen=True)
class CleanImages:
    """What the clean images come to: which are misclassified (N,), their margins (N,), and each detector's scores (N,)."""

    wrong: Tensor
    margins: Tensor
    scores: list[Tensor]


@dataclass(frozen=True)
class AttackedImages:
    """What an oblivious attack made: images (N, C, H, W), which are misclassified (N,), and each detector's scores (N,)."""

    name: str
    x_adv: Tensor
    wrong: Tensor
    scores: list[Tensor]


@dataclass(frozen=True)
class DetectionPlan:
    """What all parts of one evaluation share; the model is in attack mode, ``images`` are float32 in [0, 1]."""

    model: SplitModel
    threat: Threat
    images: ImageSet
    how: Computation
    steps: int
    restarts: int

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.how.device_of(self.model)

    def fit(self, detectors: Sequence[Detector], reference: ImageSet) -> None:
        """Fit on the features of clean images."""
        self._check(reference)
        x, features = to_float(reference.images[:]), []
        with torch.no_grad():
            for rows in _slices(len(x), self.how.batch_size):
                features.append(self.model.features(x[rows].to(self.device)))
        known, labels = torch.cat(features), reference.labels.to(self.device)
        if not torch.isfinite(known).all():  # synchronises the device
            raise UserError(
                "features must be finite, got NaN or infinity for a clean image; look for sqrt, log or division at 0 in the model"
            )
        if missing := sorted(set(range(self.model.num_classes)) - set(reference.labels.tolist())):
            raise UserError(
                f"the reference needs images of every class, got none of class {missing[0]}; "
                "give more of them (--data.labelled 1), or a model of the classes that there are"
            )
        for detector in detectors:
            detector.fit(known, labels)

    def look(self, detectors: Sequence[Detector], images: ImageSet) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return which clean images are misclassified (N,), their margins (N,), and each detector's scores (N,)."""
        self._check(images)
        wrong, margins, scores = self._verdict(detectors, to_float(images.images), images.labels)
        for values, what in (
            (margins, "logits"),
            *((s, f"scores of {d.name}") for d, s in zip(detectors, scores, strict=True)),
        ):
            if not torch.isfinite(values).all():
                raise UserError(
                    f"{what} must be finite, got NaN or infinity for a clean image; look for sqrt, log or division at 0"
                )
        return wrong, margins, scores

    def oblivious(
        self,
        number: int,
        attack: tuple[str, Attack | Search, str],
        wrong: Tensor,
        detectors: Sequence[Detector],
        tick: Tick,
    ) -> AttackedImages:
        """Attack the classifier alone, on the images that are right when clean."""
        name, how, objective = attack
        x, y = self.images.images, self.images.labels
        x_adv = x.clone()
        for rows in _slices(len(x), self.how.batch_size):
            right = (~wrong[rows]).nonzero()[:, 0] + rows.start
            key, start = f"oblivious-{number:02d}-{rows.start:06d}", time.monotonic()
            if key in self.how.state.parts:
                x_adv[rows] = self.how.state.parts[key][0]["x_adv"]
            elif len(right):
                inputs, labels = x[right].to(self.device), y[right].to(self.device)
                generator = make_generator(self.device, self.how.seed, number, rows.start)
                made = run_attack(
                    how, self.model, inputs, labels, self.threat, objective=objective, generator=generator, checked=True
                )
                x_adv[right] = made.cpu()
                self.how.state.save(key, {"x_adv": x_adv[rows].clone()}, {"seconds": time.monotonic() - start})
            tick(rows.stop - rows.start, attack=name)
        flags, _, scores = self._verdict(detectors, x_adv, y)
        return AttackedImages(name, x_adv, flags, scores)

    def measure(
        self,
        d: int,
        detector: Detector,
        calibrated: Tensor,
        clean: CleanImages,
        oblivious: Sequence[AttackedImages],
        rates: Sequence[float],
        tick: Tick,
    ) -> DetectorResult:
        """Return what detector ``d`` is worth at each clean rejection rate; ``calibrated``: its scores that set the thresholds."""
        scores, right = clean.scores[d], ~clean.wrong
        thresholds = [threshold_at(calibrated, rate) for rate in rates]
        spread = calibrated.std().item() if len(calibrated) > 1 else 0.0
        scale = (max(clean.margins.abs().mean().item(), 1e-12), max(spread, 1e-12))
        evasions = [Evasion(self.model, detector, self.threat, level, scale, self.steps) for level in thresholds]
        known = self.start(d, clean, oblivious)
        lowest = self.aware(evasions, d, len(oblivious) + d, known, tick)
        separated = [_separation(each.name, scores, each.scores[d][each.wrong & right]) for each in oblivious]
        separated.append(_separation("aware", scores, lowest[right & ~lowest.isposinf()]))
        points = [
            _point(rate, threshold, scores, clean.wrong, (known[1], lowest))
            for rate, threshold in zip(rates, thresholds, strict=True)
        ]
        return DetectorResult(name=detector.name, settings=_settings(detector), attacks=separated, curve=points)

    def start(self, d: int, clean: CleanImages, oblivious: Sequence[AttackedImages]) -> tuple[Tensor, Tensor]:
        """Return the most accepted misclassified image that is known for each image (N, C, H, W), and its score (N,)."""
        x = self.images.images
        lowest, best = torch.where(clean.wrong, clean.scores[d], torch.inf), x.clone()
        for attacked in oblivious:
            better = attacked.wrong & (attacked.scores[d] <= lowest)
            # An image that no attack has broken yet starts where the last attack left it.
            best = torch.where(per_image(better | lowest.isinf(), x), attacked.x_adv, best)
            lowest = torch.where(better, attacked.scores[d], lowest)
        return best, lowest

    def aware(
        self, evasions: Sequence[Evasion], d: int, stream: int, known: tuple[Tensor, Tensor], tick: Tick
    ) -> Tensor:
        """Attack with knowledge of detector ``d`` at each threshold; return the least score of a misclassified image, (N,)."""
        best, lowest = known[0].clone(), known[1].clone()
        for number, evasion in enumerate(evasions):  # thresholds fall: each starts from what the one before has reached
            for rows in _slices(len(best), self.how.batch_size):
                key = f"aware-{d:02d}-{rows.start:06d}"
                tensors, data = self.how.state.parts.get(key, ({}, {"thresholds": 0, "seconds": 0.0}))
                if data["thresholds"] > number:  # where a call that was stopped has got to
                    best[rows], lowest[rows] = tensors["best"], tensors["lowest"]
                else:
                    start = time.monotonic()
                    generator = make_generator(self.device, self.how.seed, stream, number, rows.start)
                    self._evade(evasion, best, lowest, rows, generator)
                    so_far = {"best": best[rows].clone(), "lowest": lowest[rows].clone()}
                    spent = data["seconds"] + time.monotonic() - start
                    self.how.state.save(key, so_far, {"thresholds": number + 1, "seconds": spent})
                safe = ~evaded(lowest[: rows.stop], evasion.threshold)
                name = evasion.detector.name
                tick(rows.stop - rows.start, detector=name, robust_or_rejected=safe.float().mean().item())
        return lowest

    def _evade(self, evasion: Evasion, best: Tensor, lowest: Tensor, rows: slice, generator: torch.Generator) -> None:
        """Attack the images in ``rows`` of which nothing below the threshold is known; update ``best`` and ``lowest``."""
        x, y = self.images.images, self.images.labels
        # A detector that rejects nothing leaves nothing to choose: all strategies are one.
        strategies = STRATEGIES if math.isfinite(evasion.threshold) else STRATEGIES[:1]
        for restart in range(self.restarts):
            for strategy in strategies:
                todo = (~evaded(lowest[rows], evasion.threshold)).nonzero()[:, 0] + rows.start
                if not len(todo):
                    return
                inputs, labels = x[todo].to(self.device), y[todo].to(self.device)
                begin, target = best[todo].to(self.device), None
                if restart:
                    begin = self.threat.random_start(inputs, generator=generator)
                    ranked = self.model(inputs).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
                    target = ranked[:, (restart - 1) % (ranked.shape[1] - 1)]
                made = evasion.search(inputs, labels, target, begin, strategy)
                if not torch.isfinite(made).all():  # synchronises the device
                    raise UserError(
                        f"the gradient of the margin or of the score of {evasion.detector.name} to the images is NaN or infinite, "
                        "so the attack says nothing; look for sqrt, log or division at 0, or evaluate in float32"
                    )
                verified(made, inputs, self.threat, f"the attack on {evasion.detector.name}")
                flags, _, scores = self._verdict([evasion.detector], made.cpu(), y[todo])
                # What the classifier gets wrong is kept if it is less suspicious than what was known.
                better = flags & (scores[0] < lowest[todo])
                best[todo[better]], lowest[todo[better]] = made.cpu()[better], scores[0][better]

    def _verdict(self, detectors: Sequence[Detector], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return (misclassified, margin, scores) of images, on the CPU; NaN is misclassified, and a NaN score not rejected."""
        wrong, margins, scores = [], [], []
        with torch.no_grad():
            for rows in _slices(len(x), self.how.batch_size):
                inputs, labels = x[rows].to(self.device), y[rows].to(self.device)
                outputs = self.model.features_and_logits(inputs)
                logits = outputs[1]
                wrong.append((~CLASSIFICATION.correct(logits, labels)).cpu())
                margins.append(margin(logits, labels).cpu())
                scored = [detector.score(self.model, inputs, outputs) for detector in detectors]
                scores.append(torch.stack(scored).nan_to_num(nan=-torch.inf).cpu() if scored else torch.empty(0))
        return torch.cat(wrong), torch.cat(margins), list(torch.cat(scores, dim=1).float()) if detectors else []

    def _check(self, images: ImageSet) -> None:
        check_inputs(to_float(images.images), images.labels, self.model.num_classes)


def _settings(detector: Detector) -> dict[str, Any]:
    known = fields(cast(Any, detector)) if is_dataclass(detector) else ()
    return {each.name: getattr(detector, each.name) for each in known if each.init}


def _separation(name: str, clean: Tensor, adversarial: Tensor) -> DetectedAttack:
    if not len(adversarial):
        return DetectedAttack(name=name, n=0, auroc=None, fpr95=None)
    return DetectedAttack(
        name=name,
        n=len(adversarial),
        auroc=auroc(clean, adversarial),
        fpr95=fpr_at_tpr(clean, adversarial),
    )


def _point(
    rate: float, threshold: float, scores: Tensor, wrong: Tensor, lowest: tuple[Tensor, Tensor]
) -> DetectionPoint:
    """Return what is left at a threshold; ``lowest``: least scores under the oblivious and the aware attacks."""
    accepted = scores <= threshold
    return DetectionPoint(
        rate=rate,
        threshold=None if math.isinf(threshold) else threshold,
        clean_rejected=estimate((~accepted).tolist()),
        accepted_accuracy=estimate((~wrong[accepted]).tolist()) if accepted.any() else None,
        oblivious=estimate((~evaded(lowest[0], threshold)).tolist()),
        aware=estimate((~evaded(lowest[1], threshold)).tolist()),
    )


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
