"""Tell adversarial images from clean ones by a model's features, and attack the model and its detector together.

A detector that is tested only against attacks which do not know it says nothing: Carlini & Wagner 2017 (arXiv:1705.07263) broke
ten. So every figure here comes twice, against attacks on the classifier alone (oblivious) and against one that knows the detector
and its threshold (aware).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from clead.attacks.pgd import PGD
from clead.attacks.runner import check_inputs, run_attack, verified
from clead.data.base import stratified
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32
from clead.evaluation.state import ResumableResults
from clead.interfaces import Attack, ImageSet, Search, Threat
from clead.losses.margin import margin
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.progress import Tick, progress
from clead.results.record import Estimate
from clead.results.statistics import estimate
from clead.settings import Ratio
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import flat, per_image

RATES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Fractions of the clean images that a detector may reject; each has its threshold, and its own aware attack."""
STRATEGIES = ("joint", "selective", "orthogonal")
"""Directions of the aware attack, one after the other on the images that still hold; see ``_direction``."""
NamedAttacks = Sequence[tuple[str, Attack | Search, str]]
Outputs = tuple[Tensor, Tensor]


class Detector(Protocol):
    """Scores images by how suspicious they are; larger is more suspicious. ``fit`` sees clean images only."""

    name: ClassVar[str]

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Learn what clean images look like: ``features`` (N, D) of the encoder, ``labels`` (N,)."""
        ...

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return (B,), differentiable in ``x``, each image by itself; ``outputs`` are the model's at ``x`` if known."""
        ...


@dataclass
class Mahalanobis:
    """min_c √((h − μ_c)ᵀ Σ⁻¹ (h − μ_c)), Σ shared by the classes (Lee et al. 2018, arXiv:1807.03888, eqs. 1 and 2).

    Departures: only the features that the classifier reads, without the paper's input preprocessing and its weighting of layers,
    which is fitted on adversarial images; and Σ + ridge · tr(Σ)/D · I, since features that are always 0 would make Σ singular.
    """

    name: ClassVar[str] = "mahalanobis"
    ridge: float = 0.01
    _means: Tensor | None = field(default=None, init=False, repr=False)
    _whiten: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise UserError(f"ridge must be above 0 and finite, got {self.ridge}; give Mahalanobis(ridge=0.01)")

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Keep the mean of each class that occurs, and a W with W Wᵀ = Σ⁻¹, in the precision of ``features``."""
        h = features.double()
        classes, place = labels.unique(return_inverse=True)
        means = torch.stack([h[place == c].mean(0) for c in range(len(classes))])
        centred = h - means[place]
        covariance = centred.T @ centred / len(h)
        level = covariance.trace() / len(covariance)
        if not level > 0:  # synchronises the device
            raise UserError(
                "the features of each class are all equal, so there is no covariance; give more reference images"
            )
        covariance.diagonal().add_(self.ridge * level)
        root = torch.linalg.cholesky(covariance)
        self._whiten = torch.linalg.inv(root).T.to(features.dtype)
        self._means = means.to(features.dtype) @ self._whiten

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return the distance to the nearest class, (B,)."""
        if self._means is None or self._whiten is None:
            raise RuntimeError("fit the detector before it scores")
        h = (outputs or model.features_and_logits(x))[0] @ self._whiten
        # Not by the matrix product, which cancels in float32.
        return torch.cdist(h, self._means, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


@dataclass
class NearestNeighbours:
    """‖z − z_(k)‖², z = h/‖h‖ and z_(k) its k-th nearest among clean images (Sun et al. 2022, arXiv:2204.06507, section 3).

    Departures: the square orders images alike and has a gradient at 0; k is 10 instead of 50 (CIFAR-10), for small references.
    """

    name: ClassVar[str] = "nearest_neighbours"
    k: int = 10
    _known: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}; give NearestNeighbours(k=10)")

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Keep the directions of all features; raises UserError if there are fewer than k."""
        if len(features) < self.k:
            raise UserError(
                f"the k-th neighbour needs at least k = {self.k} reference images, got {len(features)}; "
                f"give more images, or NearestNeighbours(k={len(features)})"
            )
        self._known = F.normalize(features, dim=1)

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return the squared distance to the k-th nearest direction, (B,) in [0, 4]."""
        if self._known is None:
            raise RuntimeError("fit the detector before it scores")
        z = F.normalize((outputs or model.features_and_logits(x))[0], dim=1)
        return 2 - 2 * (z @ self._known.T).topk(self.k, dim=1).values[:, -1]


@dataclass
class Disagreement:
    """max_t 1 − cos(h(x), h(t(x))) over small changes t: shifts, noise, a mirror image.

    Source: feature squeezing (Xu et al. 2018, arXiv:1704.01155, section 5) compares a prediction with that on a simplified image;
    Roth et al. 2019 (arXiv:1902.04818) look at how logits move under noise. Departure: features are compared, not softmax vectors,
    which saturate: their vanishing gradient would hide the detector's weakness from an attack that knows it.

    The noise is drawn once from ``seed``, the same for every image, so that the score is a function of x, which an attack knows.
    """

    name: ClassVar[str] = "disagreement"
    shift: int = 1
    noise: float = 0.05
    draws: int = 2
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0 or self.draws < 0 or not 0 <= self.noise < math.inf:
            raise UserError(
                f"shift, draws and noise must be at least 0, got {self.shift}, {self.draws} and {self.noise}; "
                "give Disagreement(shift=1, draws=2, noise=0.05)"
            )
        if not (self.shift or (self.draws and self.noise) or self.flip):
            raise UserError(
                "at least one change is needed, got shift, noise or draws 0 and no flip; give Disagreement(shift=1)"
            )

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Do nothing: the image is compared with itself only."""

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return the largest disagreement, (B,) in [0, 2]; one forward pass for each change."""
        h = (outputs or model.features_and_logits(x))[0]
        return torch.stack([1 - F.cosine_similarity(h, model.features(view), dim=1) for view in self._views(x)]).amax(0)

    def _views(self, x: Tensor) -> Iterator[Tensor]:
        if self.shift:
            s, (height, width) = self.shift, x.shape[-2:]
            padded = F.pad(x, (s, s, s, s), mode="replicate")
            for top, left in ((0, s), (2 * s, s), (s, 0), (s, 2 * s)):
                yield padded[..., top : top + height, left : left + width]
        if self.noise and self.draws:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            for _ in range(self.draws):
                noise = torch.randn(x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
                yield (x + self.noise * noise).clamp(0, 1)
        if self.flip:
            yield x.flip(-1)


DETECTORS: dict[str, type[Any]] = {kind.name: kind for kind in (Mahalanobis, NearestNeighbours, Disagreement)}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectedAttack(_Part):
    """How well a detector tells the clean images from the adversarial images of one attack.

    Only the ``n`` adversarial images that are misclassified, of images that are right when clean, count. ``auroc`` is the
    probability that one of them scores above a clean image; ``fpr95`` the fraction of the clean images that is rejected where 95 %
    of them are. None where n is 0.
    """

    name: str
    n: int
    auroc: float | None
    fpr95: float | None


class DetectionPoint(_Part):
    """One threshold, set where ``rate`` of clean images are rejected; ``threshold`` None: none is.

    ``clean_rejected`` is what that comes to on the evaluated images, ``accepted_accuracy`` the accuracy on those that are accepted
    (None: there is none). ``oblivious`` and ``aware``: the fraction of all images for which no image was found in the threat set,
    the clean one included, that is misclassified and accepted.
    """

    rate: float
    threshold: float | None
    clean_rejected: Estimate
    accepted_accuracy: Estimate | None
    oblivious: Estimate
    aware: Estimate


class DetectorPart(_Part):
    """One detector: separation per attack, and the curve of robust-or-rejected accuracy against the clean rejection rate."""

    name: str
    settings: dict[str, Any]
    attacks: list[DetectedAttack]
    curve: list[DetectionPoint]


class Detection(_Part):
    """What ``evaluate_detection`` found; ``robust`` is the accuracy under the oblivious attacks without any detector."""

    images: int
    fitted: int
    calibrated: int
    norm: str
    eps: float
    eps_text: str
    steps: int
    restarts: int
    seed: int
    clean: Estimate
    robust: Estimate
    detectors: list[DetectorPart]
    seconds: float


def auroc(clean: Tensor, adversarial: Tensor) -> float:
    """Return P(adversarial score > clean score) + P(equal)/2, the area under the ROC curve (Mann & Whitney 1947).

    >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    ranks = rankdata(torch.cat([adversarial, clean]).double().numpy())
    n, m = len(adversarial), len(clean)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fpr_at_tpr(clean: Tensor, adversarial: Tensor, tpr: float = 0.95) -> float:
    """Return the fraction of clean scores at or above the largest threshold that ``tpr`` of the adversarial scores reach.

    >>> fpr_at_tpr(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0]))
    0.5
    """
    needed = max(1, math.ceil(tpr * len(adversarial) - 1e-9))
    threshold = adversarial.sort(descending=True).values[needed - 1]
    return (clean >= threshold).double().mean().item()


def threshold_at(scores: Tensor, rate: float) -> float:
    """Return t so that a fresh clean image has a score above t with probability ≤ ``rate``; infinity where no t is sure to.

    The ⌈(n + 1)(1 − rate)⌉-th smallest of n calibration scores (split conformal prediction; Vovk et al. 2005, sections 2 and 4).

    >>> threshold_at(torch.arange(1.0, 10.0), 0.2), threshold_at(torch.arange(1.0, 10.0), 0.05)
    (8.0, inf)
    """
    place = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    return math.inf if place > len(scores) else scores.sort().values[max(place, 1) - 1].item()


def evaluate_detection(
    model: nn.Module,
    reference: ImageSet,
    images: ImageSet,
    threat: Threat,
    *,
    calibration: ImageSet | None = None,
    detectors: Sequence[Detector] | None = None,
    attacks: NamedAttacks | None = None,
    rates: Sequence[float] = RATES,
    steps: int = 100,
    restarts: int = 3,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | None = None,
    state: ResumableResults | None = None,
    show: bool = True,
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
        calibration: other clean images that set the thresholds, such as the validation images; None: half of ``reference`` is kept
            back for it, since an image is its own neighbour.
        detectors: None: ``Mahalanobis``, ``NearestNeighbours`` and ``Disagreement`` with their defaults.
        attacks: the oblivious ones, each (name, attack, objective); None: PGD of ``steps`` with cross-entropy and with the margin.
        rates: clean rejection rates in [0, 1).
        steps: of the aware attack, per threshold, strategy and restart.
        restarts: of the aware attack; the first starts at the best point so far, the others at random points, each towards another
            class, the most likely first.
        batch_size: images attacked at once.
        seed: of the random starts and of the halves.
        device: where to compute; that of the model's parameters if None.
        state: keeps finished batches of each attack: a call that was stopped goes on from there; None: nothing is kept.
        show: whether to show progress.

    Raises UserError if the model has no features, on invalid images, and on values out of range.
    """
    if not isinstance(model, SplitModel):
        raise UserError(
            f"detection needs a model split into features and classifier, got a {type(model).__name__}; "
            "wrap it with clead.adapt(model, sample_shape=(C, H, W))"
        )
    rates = sorted(set(rates))
    if not rates or not all(0 <= rate < 1 for rate in rates):
        raise UserError(
            f"rates must be one or more clean rejection rates in [0, 1), got {rates}; give rates=[0.01, 0.05]"
        )
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; give {name}=1 or more")
    if calibration is None:
        first, second = stratified(reference.labels, len(reference) // 2, seed)
        reference, calibration = reference.subset(first), reference.subset(second)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    detectors = [kind() for kind in DETECTORS.values()] if detectors is None else list(detectors)
    if attacks is None:
        pgd = PGD(steps=steps, keep="best")
        attacks = [(f"PGD-{steps} {name}", pgd, name) for name in ("cross_entropy", "margin")]

    state = state or ResumableResults(None, {})
    plan = _DetectionPlan(model, threat, batch_size, device, state)
    total = len(images) * (len(attacks) + len(detectors) * len(rates))
    with exact_float32(), attack_mode(model):
        plan.fit(detectors, reference)
        calibrated = plan.look(detectors, calibration)[2]
        x, y = _pixels(images.images), images.labels
        wrong, margins, scores = plan.look(detectors, images)
    with state.opened(), exact_float32(), attack_mode(model), progress("detect", total, show=show) as tick:
        oblivious = [
            plan.oblivious(attack, x, y, wrong, detectors, number, seed, tick) for number, attack in enumerate(attacks)
        ]
        parts = []
        for d, detector in enumerate(detectors):
            thresholds = [threshold_at(calibrated[d], rate) for rate in rates]
            # The most accepted misclassified image found for each image so far, and its score.
            lowest, best = torch.where(wrong, scores[d], torch.inf), x.clone()
            for found in oblivious:
                better = found.wrong & (found.scores[d] <= lowest)
                # An image that no attack has broken yet starts where the last attack left it.
                best = torch.where(per_image(better | lowest.isinf(), x), found.x_adv, best)
                lowest = torch.where(better, found.scores[d], lowest)
            known = lowest.clone()
            spread = calibrated[d].std().item() if len(calibrated[d]) > 1 else 0.0
            scale = (max(margins.abs().mean().item(), 1e-12), max(spread, 1e-12))
            for number, threshold in enumerate(thresholds):  # falling: each starts from what the one before has reached
                for here in _slices(len(x), batch_size):
                    key = f"aware-{d:02d}-{here.start:06d}"
                    tensors, data = state.parts.get(key, ({}, {"thresholds": 0, "seconds": 0.0}))
                    if data["thresholds"] > number:  # where a call that was stopped has got to
                        best[here], lowest[here] = tensors["best"], tensors["lowest"]
                    else:
                        start = time.monotonic()
                        generator = make_generator(device, seed, len(attacks) + d, number, here.start)
                        plan.aware(detector, threshold, scale, x, y, best, lowest, here, steps, restarts, generator)
                        so_far = {"best": best[here].clone(), "lowest": lowest[here].clone()}
                        spent = data["seconds"] + time.monotonic() - start
                        state.save(key, so_far, {"thresholds": number + 1, "seconds": spent})
                    held = ~_evaded(lowest[: here.stop], threshold)
                    tick(here.stop - here.start, detector=detector.name, robust_or_rejected=held.float().mean().item())
            separated = [
                _separation(name, scores[d], found.scores[d][found.wrong & ~wrong])
                for (name, _, _), found in zip(attacks, oblivious, strict=True)
            ]
            separated.append(_separation("aware", scores[d], lowest[~wrong & ~lowest.isposinf()]))
            points = [
                _point(rate, threshold, scores[d], wrong, known, lowest)
                for rate, threshold in zip(rates, thresholds, strict=True)
            ]
            known_fields = fields(cast(Any, detector)) if is_dataclass(detector) else ()
            settings = {f.name: getattr(detector, f.name) for f in known_fields if f.init}
            parts.append(DetectorPart(name=detector.name, settings=settings, attacks=separated, curve=points))
    broken = torch.stack([wrong, *(found.wrong for found in oblivious)]).any(0)
    eps = Ratio(threat.eps)
    return Detection(
        images=len(images),
        fitted=len(reference),
        calibrated=len(calibration),
        norm=threat.norm,
        eps=float(eps),
        eps_text=eps.text,
        steps=steps,
        restarts=restarts,
        seed=seed,
        clean=estimate((~wrong).tolist()),
        robust=estimate((~broken).tolist()),
        detectors=parts,
        seconds=sum(data["seconds"] for _, data in state.parts.values()),
    )


@dataclass(frozen=True)
class _Found:
    """What an oblivious attack made: images (N, C, H, W), which are misclassified (N,), and each detector's scores (N,)."""

    x_adv: Tensor
    wrong: Tensor
    scores: list[Tensor]


@dataclass(frozen=True)
class _DetectionPlan:
    """What all parts of one evaluation share; the model is in attack mode."""

    model: SplitModel
    threat: Threat
    batch_size: int
    device: torch.device
    state: ResumableResults

    def fit(self, detectors: Sequence[Detector], reference: ImageSet) -> None:
        """Fit on the features of clean images."""
        self._check(reference)
        x, features = _pixels(reference.images[:]), []
        with torch.no_grad():
            for here in _slices(len(x), self.batch_size):
                features.append(self.model.features(x[here].to(self.device)))
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
        wrong, margins, scores = self._verdict(detectors, _pixels(images.images), images.labels)
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
        attack: tuple[str, Attack | Search, str],
        x: Tensor,
        y: Tensor,
        wrong: Tensor,
        detectors: Sequence[Detector],
        number: int,
        seed: int,
        tick: Tick,
    ) -> _Found:
        """Attack the classifier alone, on the images that are right when clean."""
        name, how, objective = attack
        x_adv = x.clone()
        for here in _slices(len(x), self.batch_size):
            right = (~wrong[here]).nonzero()[:, 0] + here.start
            key, start = f"oblivious-{number:02d}-{here.start:06d}", time.monotonic()
            if key in self.state.parts:
                x_adv[here] = self.state.parts[key][0]["x_adv"]
            elif len(right):
                part, labels = x[right].to(self.device), y[right].to(self.device)
                generator = make_generator(self.device, seed, number, here.start)
                made = run_attack(
                    how, self.model, part, labels, self.threat, objective=objective, generator=generator, checked=True
                )
                x_adv[right] = made.cpu()
                self.state.save(key, {"x_adv": x_adv[here].clone()}, {"seconds": time.monotonic() - start})
            tick(here.stop - here.start, attack=name)
        flags, _, scores = self._verdict(detectors, x_adv, y)
        return _Found(x_adv, flags, scores)

    def aware(
        self,
        detector: Detector,
        threshold: float,
        scale: tuple[float, float],
        x: Tensor,
        y: Tensor,
        best: Tensor,
        lowest: Tensor,
        here: slice,
        steps: int,
        restarts: int,
        generator: torch.Generator,
    ) -> None:
        """Attack classifier and detector together, where nothing below ``threshold`` is known; update ``best`` and ``lowest``."""
        # A detector that rejects nothing leaves nothing to choose: all strategies are one.
        strategies = STRATEGIES if math.isfinite(threshold) else STRATEGIES[:1]
        for restart in range(restarts):
            for strategy in strategies:
                todo = (~_evaded(lowest[here], threshold)).nonzero()[:, 0] + here.start
                if not len(todo):
                    return
                part, labels = x[todo].to(self.device), y[todo].to(self.device)
                begin, target = best[todo].to(self.device), None
                if restart:
                    begin = self.threat.random_start(part, generator=generator)
                    ranked = self.model(part).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
                    target = ranked[:, (restart - 1) % (ranked.shape[1] - 1)]
                made = _evade(
                    self.model, detector, threshold, scale, part, labels, target, begin, self.threat, steps, strategy
                )
                if not torch.isfinite(made).all():  # synchronises the device
                    raise UserError(
                        f"the gradient of the margin or of the score of {detector.name} to the images is NaN or infinite, so the "
                        "attack says nothing; look for sqrt, log or division at 0, or evaluate in float32"
                    )
                verified(made, part, self.threat, f"the attack on {detector.name}")
                flags, _, scores = self._verdict([detector], made.cpu(), y[todo])
                # What the classifier gets wrong is kept if it is less suspicious than what was known.
                better = flags & (scores[0] < lowest[todo])
                best[todo[better]], lowest[todo[better]] = made.cpu()[better], scores[0][better]

    def _verdict(self, detectors: Sequence[Detector], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return (misclassified, margin, scores) of images, on the CPU; NaN is misclassified, and a NaN score not rejected."""
        wrong, margins, scores = [], [], []
        with torch.no_grad():
            for here in _slices(len(x), self.batch_size):
                part, labels = x[here].to(self.device), y[here].to(self.device)
                outputs = self.model.features_and_logits(part)
                logits = outputs[1]
                wrong.append((~CLASSIFICATION.correct(logits, labels)).cpu())
                margins.append(margin(logits, labels).cpu())
                scored = [detector.score(self.model, part, outputs) for detector in detectors]
                scores.append(torch.stack(scored).nan_to_num(nan=-torch.inf).cpu() if scored else torch.empty(0))
        return torch.cat(wrong), torch.cat(margins), list(torch.cat(scores, dim=1).float()) if detectors else []

    def _check(self, images: ImageSet) -> None:
        check_inputs(_pixels(images.images), images.labels, self.model.num_classes)


def _evade(
    model: SplitModel,
    detector: Detector,
    threshold: float,
    scale: tuple[float, float],
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    begin: Tensor,
    threat: Threat,
    steps: int,
    strategy: str,
) -> Tensor:
    """Look for misclassified images with a score ≤ ``threshold``; return per image the misclassified one of least score.

    The margin climbed is that of any wrong class, or of ``target`` (B,) if given. Projected steepest ascent with steps that shrink
    from eps to eps/100; images are dropped once they have evaded. Where nothing is misclassified, the last point is returned.
    """
    best, last = begin.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    index, x_adv = torch.arange(len(x), device=x.device), begin
    # A hair inside both borders, so that rounding in a batch of another size does not undo it.
    inside = threshold - 1e-4 * scale[1]
    for step in range(steps + 1):
        gap, score, rise, suspicion = _slopes(model, detector, x_adv, y, target)
        score = score.nan_to_num(nan=-torch.inf)  # never rejected, and +inf becomes the largest number
        wrong = (gap > 1e-5 * scale[0]) | gap.isnan()
        better = (wrong & (score < last[index])) | last[index].isinf() & ~wrong
        best[index[better]] = x_adv[better]
        last[index[better & wrong]] = score[better & wrong]
        keep = ~_evaded(last[index], inside)
        if step == steps or not keep.any():  # synchronises the device
            break
        direction = _direction(strategy, wrong, score > inside, rise, suspicion, scale)
        x_adv = threat.project(threat.ascend(x_adv, direction, threat.eps * 0.01 ** (step / steps)), x)
        if not keep.all():
            index, x, y, x_adv = index[keep], x[keep], y[keep], x_adv[keep]
            target = None if target is None else target[keep]
    return best


def _slopes(
    model: SplitModel, detector: Detector, x: Tensor, y: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return margin and score, (B,), and the gradients to the images of the margin (to ``target``'s logit if given) and score."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = model.features_and_logits(x)
        gap, score = margin(outputs[1], y), detector.score(model, x, outputs)
        logits = outputs[1]
        climbed = gap if target is None else -margin(logits, target)
        (rise,) = torch.autograd.grad(climbed.sum(), x, retain_graph=True)
        (suspicion,) = torch.autograd.grad(score.sum(), x)
    return gap.detach(), score.detach(), rise, suspicion


def _direction(
    strategy: str, wrong: Tensor, rejected: Tensor, rise: Tensor, suspicion: Tensor, scale: tuple[float, float]
) -> Tensor:
    """Return the direction in which to move, given the gradients of the margin and of the score.

    joint: of margin/s_m − max(0, score − threshold)/s_s, s the size of each on clean images. selective: raise the margin until the
    image is misclassified, then lower the score. orthogonal: the same, each without its part along the other's gradient (both
    Bryniarski et al. 2022, arXiv:2106.15023, section 4).
    """
    fool, hide = per_image(wrong, rise), per_image(rejected, rise)
    if strategy == "joint":
        return rise / scale[0] - torch.where(hide, suspicion / scale[1], 0)
    if strategy == "orthogonal":
        # Where the image is accepted anyway, the detector puts no bound on the direction.
        rise, suspicion = torch.where(hide, _without(rise, suspicion), rise), _without(suspicion, rise)
    return torch.where(fool, -suspicion, rise)


def _without(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a`` less its part along ``b``, per image."""
    along = (flat(a) * flat(b)).sum(1) / flat(b).square().sum(1).clamp_min(1e-30)
    return a - per_image(along, a) * b


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
    rate: float, threshold: float, scores: Tensor, wrong: Tensor, oblivious: Tensor, aware: Tensor
) -> DetectionPoint:
    accepted = scores <= threshold
    return DetectionPoint(
        rate=rate,
        threshold=None if math.isinf(threshold) else threshold,
        clean_rejected=estimate((~accepted).tolist()),
        accepted_accuracy=estimate((~wrong[accepted]).tolist()) if accepted.any() else None,
        oblivious=estimate((~_evaded(oblivious, threshold)).tolist()),
        aware=estimate((~_evaded(aware, threshold)).tolist()),
    )


def _evaded(lowest: Tensor, threshold: float) -> Tensor:
    """Return where a misclassified image with a score up to ``threshold`` is known; ``lowest`` is infinite where none is known."""
    return (lowest <= threshold) & ~lowest.isposinf()


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
