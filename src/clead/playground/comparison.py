"""What the playground computes: one image attacked on each model, how far each holds, and a small leaderboard. No page in here.

Every attack is white-box and runs on each model by itself: what breaks one model is tried on the others only to see whether it
transfers.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn

from clead.api.results import read_record
from clead.attacks.fmn import FMN
from clead.attacks.pgd import PGD
from clead.attacks.runner import check_finite, finite_images, run_attack
from clead.data.base import fingerprint
from clead.data.decoding import decode
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.inference.models import FittedDetector, ServedModel
from clead.inference.problems import Problem
from clead.inference.request_parsing import count_pixels
from clead.interfaces import Attack, ImageSet, Search, Threat
from clead.measurements.distances import distances
from clead.models.split import SplitModel, adapt, copied
from clead.models.threshold import AtThreshold, judged
from clead.playground.choices import (
    ATTACK_SECONDS,
    MAX_FILE,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_RUNS,
    AttackSettings,
    Radii,
    integer,
    radii,
)
from clead.results.record import Estimate, Record
from clead.results.statistics import estimate
from clead.runs.loading import evaluated_images
from clead.settings import Ratio
from clead.tasks import Task, task_name
from clead.tasks.classification import CLASSIFICATION, Classification
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS

Report = Callable[[float, str], None]
"""Is called with how much is done, in [0, 1], and what is being done."""

_CURVE_STEPS = 20
_CURVE_POINTS = 8
_FMN_STEPS = 100
_HALVINGS = 5


class Prediction(NamedTuple):
    """What one model says of one image: probabilities (K,), the most probable class, and the detector's score, or None."""

    probabilities: list[float]
    answer: int
    score: float | None


@dataclass(frozen=True)
class PlaygroundModel:
    """One model of the playground: its own copy, because an attack changes a model's mode while it runs."""

    name: str
    method: str
    model: SplitModel
    detector: FittedDetector | None
    record: Record | None
    device: torch.device

    def predict(self, x: Tensor) -> list[Prediction]:
        """Return what the model and its detector say of images (n, C, H, W) in [0, 1]."""
        x = x.to(self.device)
        with exact_float32(), torch.inference_mode():
            features, logits = self.model.features_and_logits(x)
            scores: list[float | None] = [None] * len(x)
            if self.detector is not None:
                scores = self.detector.score(self.model, x, (features, logits)).tolist()
        if not torch.isfinite(logits).all():
            raise UserError(f"{self.name} answers NaN or infinity to this image; choose another one")
        plain = self.model.unshifted(logits) if isinstance(self.model, AtThreshold) else logits
        rows, answers = plain.softmax(1).tolist(), CLASSIFICATION.predict(logits).tolist()
        return [Prediction(*values) for values in zip(rows, answers, scores, strict=True)]


class CountedModel(nn.Module):
    """A model as attacks get it: it counts how often it is asked, reports it, and stops what takes longer than a minute.

    Args:
        of: the model.
        report: is called with how much of the whole work is done.
        text: what is being done.
        expected: how often the model will be asked, about.
        share: (i, n): this is the i-th of n equal parts of the work.
    """

    def __init__(
        self, of: PlaygroundModel, report: Report | None, text: str, expected: int, share: tuple[int, int]
    ) -> None:
        super().__init__()
        self.model, self.device, self.report, self.text = of.model, of.device, report, text
        self.expected, self.share = expected, share
        self.deadline, self.passes = time.monotonic() + ATTACK_SECONDS, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K); raises UserError once the time is up."""
        self.passes += 1
        if time.monotonic() > self.deadline:
            raise UserError("the attack took too long and was stopped; choose fewer steps, or fewer images")
        if self.report is not None:
            index, count = self.share
            self.report((index + min(self.passes / self.expected, 1.0)) / count, self.text)
        return self.model(x)

    def attack(
        self, attack: Attack | Search, x: Tensor, y: Tensor, threat: Threat, seed: int, task: Task = CLASSIFICATION
    ) -> Tensor:
        """Return x_adv on the CPU, verified to be in the threat set."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x, y = x.to(self.device), y.to(self.device)
        with exact_float32():
            model = self if task == CLASSIFICATION else adapt(self, sample_shape=(x.shape[1], x.shape[2], x.shape[3]))
            x_adv = run_attack(
                attack, model, x, y, threat, generator=generator, checked=True, precision=None, task=task
            )
        check_finite(x_adv, type(attack).__name__)
        return x_adv.cpu()


@dataclass(frozen=True)
class Comparison:
    """All models, the test images that they share, and what may be chosen.

    Attributes:
        models: the first two meet side by side; all are on the leaderboard.
        images: of the evaluation, uint8.
        classes: K names.
        served: the first model as it is served: its shape, and how an image file comes to it.
        radii: default and largest radius by norm.
        start: what the page begins with.
    """

    models: tuple[PlaygroundModel, ...]
    images: ImageSet
    classes: tuple[str, ...]
    served: ServedModel
    radii: Mapping[str, Radii]
    start: AttackSettings

    @property
    def pair(self) -> tuple[PlaygroundModel, ...]:
        """Return the one or two models that meet side by side."""
        return self.models[:2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the images."""
        return self.served.shape


def open_comparison(served: Mapping[str, ServedModel]) -> Comparison:
    """Return the comparison of ``served`` models.

    Raises UserError if there are more than eight, or if they differ in task, classes, shape or test images: one image is shown to
    all.
    """
    if not 1 <= len(served) <= MAX_RUNS:
        raise UserError(f"the playground takes 1 to {MAX_RUNS} runs, got {len(served)}; leave some out")
    first = next(iter(served.values()))
    models, hardened, read = [], [], {}
    for each in served.values():
        if (each.classes, each.shape) != (first.classes, first.shape):
            raise UserError(
                f"{each.name} knows {len(each.classes)} classes of images {each.shape}, {first.name} {len(first.classes)} of "
                f"{first.shape}; give runs of the same data"
            )
        config = each.config
        key = (repr(config.data), each.trained.train.seed, config.eval.split, config.eval.images)
        if key not in read:  # large data is read once for runs that share it
            images = evaluated_images(each.run, config, each.trained, None)[0]
            read[key] = images, fingerprint([images], each.classes)
        if read[key][1] != next(iter(read.values()))[1]:
            text = f"{each.name} has other test images than {first.name}"
            raise UserError(f"{text}; give runs of the same data and split")
        if (each.task == SEGMENTATION) != (first.task == SEGMENTATION):
            tasks = f"{each.name} is of the task {task_name(each.task)}, {first.name} of {task_name(first.task)}"
            raise UserError(f"{tasks}; give runs of the same task")
        if not isinstance(each.task, Classification) and each.task != SEGMENTATION:
            raise UserError(
                f"{each.name} is of the task {task_name(each.task)}, and the playground shows one class per image, or masks; "
                f"attack it with clead attack {each.run.path}"
            )
        model = cast(SplitModel, judged(copied(each.model), each.task)).requires_grad_(False).eval()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        record = read_record(each.run.path) if (each.run.path / "results" / "evaluation.json").exists() else None
        method = each.trained.to_dict()["method"]["name"]
        models.append(PlaygroundModel(each.name, method, model, each.detector, record, device))
        hardened += [config] if method != "standard" else []
    threat = (hardened or [each.config])[0].threat
    allowed = radii(first.shape, threat.norm, Ratio(threat.eps))
    norm = threat.norm if threat.norm in allowed else "linf"
    start = AttackSettings(norm=norm, eps=allowed[norm].default)
    return Comparison(tuple(models), next(iter(read.values()))[0], first.classes, first, allowed, start)


def read_image(content: bytes, comparison: Comparison) -> tuple[Tensor, tuple[int, int]]:
    """Return an image file as (C, H, W) uint8, resized as the training's images were, and its own (width, height).

    Raises UserError, before anything is decoded, if the file is too long, has too many pixels, or is no image.
    """
    if len(content) > MAX_FILE:
        text = f"at most {MAX_FILE // 2**20} MiB are read, got {len(content) / 2**20:.1f}; shrink it"
        raise UserError(f"the file: {text}")
    try:
        count_pixels([content], MAX_PIXELS)
    except Problem as problem:
        text = problem.detail.replace("image 0", "the file")
        if problem.status == 413:
            text = f"the file: an image may have {MAX_PIXELS / 1e6:g} megapixels, this one has more; shrink it"
        raise UserError(text) from None
    image = decode([content], ["the file"], comparison.served.fit)[0]
    if tuple(image.shape) != comparison.shape:
        (_, height, width), given = comparison.shape, f"{image.shape[2]}×{image.shape[1]}"
        text = f"the file: the models were trained on images of {width}×{height} pixels, got {given}"
        raise UserError(f"{text}; resize it, as nothing did in its training")
    with Image.open(io.BytesIO(content)) as opened:
        return image, opened.size


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model under one attack.

    Attributes:
        model: the model.
        label: what the attack drives the answer away from.
        label_is_answer: whether that label is the model's own answer.
        clean: what the model says of the image.
        adversarial: what it says of ``x_adv``.
        x_adv: (C, H, W) in [0, 1]; the clean image where there was nothing to attack.
        attacked: False where the clean image was classified wrong already.
        size: of the change, in the attack's norm.
        seconds: that it took.
        passes: how often the model was asked.
        elsewhere: what the other models answer to this model's adversarial image, by name.
    """

    model: PlaygroundModel
    label: int
    label_is_answer: bool
    clean: Prediction
    adversarial: Prediction
    x_adv: Tensor
    attacked: bool
    size: float
    seconds: float
    passes: int
    elsewhere: dict[str, int]

    @property
    def broken(self) -> bool:
        """Whether the attack made the model's right answer a wrong one."""
        return self.attacked and self.adversarial.answer != self.label


def attack_image(
    models: Sequence[PlaygroundModel],
    image: Tensor,
    label: int | None,
    settings: AttackSettings,
    report: Report | None = None,
) -> list[Outcome]:
    """Attack ``image`` on each model by itself.

    Args:
        models: the models.
        image: (C, H, W) uint8.
        label: the true class; None: each model's own answer.
        settings: the attack.
        report: is called with the progress.

    Each adversarial image is verified: inside the threat set, and classified again by the plain model in float32. Raises UserError
    if an attack takes longer than a minute.
    """
    x = to_float(image[None])
    threat = THREATS.get(settings.norm)(eps=settings.eps)
    attack, expected = settings.option.make(settings.steps), settings.option.passes(settings.steps)
    outcomes = []
    for i, model in enumerate(models):
        started = time.monotonic()
        clean = model.predict(x)[0]
        target = clean.answer if label is None else label
        counted = CountedModel(model, report, f"attacking {model.name}", expected, (i, len(models)))
        x_adv, attacked = x, clean.answer == target
        if attacked:
            x_adv = counted.attack(attack, x, torch.tensor([target]), threat, settings.seed)
        outcome = Outcome(
            model=model,
            label=target,
            label_is_answer=label is None,
            clean=clean,
            adversarial=model.predict(x_adv)[0],
            x_adv=x_adv[0],
            attacked=attacked,
            size=float(threat.distance(x_adv - x)),
            seconds=time.monotonic() - started,
            passes=counted.passes,
            elsewhere={other.name: other.predict(x_adv)[0].answer for other in models if other is not model},
        )
        outcomes.append(outcome)
    return outcomes


@dataclass(frozen=True)
class EpsilonCurve:
    """How one model's probability of the right class falls with ε on one image.

    Attributes:
        model: the model.
        radii: rising, from 0.
        probabilities: the smallest found for the label in the ball of each radius.
        smallest: size of the smallest change found that makes the answer wrong; 0: it is wrong without one; None: none was found.
    """

    model: PlaygroundModel
    radii: list[float]
    probabilities: list[float]
    smallest: float | None


def epsilon_curves(
    image: Tensor,
    outcomes: Sequence[Outcome],
    settings: AttackSettings,
    max_eps: float,
    report: Report | None = None,
) -> list[EpsilonCurve]:
    """Return for each model how it gives way on ``image`` (C, H, W) uint8 as ε grows to twice the chosen one.

    At each radius PGD of 20 steps, and the chosen attack's own image at the chosen one; FMN of 100 steps looks for the smallest
    change that makes the answer wrong, and PGD halves the way down to it. A point found in a smaller ball counts in the larger
    ones, since they hold it too. ``max_eps``: the largest radius that is allowed.
    """
    eps = float(settings.eps)
    top = min(2 * eps, max(max_eps, eps))
    grid = sorted({*(top * i / _CURVE_POINTS for i in range(_CURVE_POINTS + 1)), eps})
    expected = (len(grid) - 1 + _HALVINGS) * (_CURVE_STEPS + 1) + _FMN_STEPS
    curves = []
    for i, outcome in enumerate(outcomes):
        model, clean = outcome.model, outcome.clean.probabilities[outcome.label]
        if outcome.attacked:
            counted = CountedModel(model, report, f"how far {model.name} holds", expected, (i, len(outcomes)))
            curves.append(_epsilon_curve(to_float(image[None]), outcome, settings, grid, counted))
        else:
            curves.append(EpsilonCurve(model, grid, [clean] * len(grid), 0.0))
    return curves


def _epsilon_curve(
    x: Tensor, outcome: Outcome, settings: AttackSettings, grid: list[float], counted: CountedModel
) -> EpsilonCurve:
    model, label = outcome.model, outcome.label
    y = torch.tensor([label], device=model.device)
    attack, threats = PGD(steps=_CURVE_STEPS, keep="best"), THREATS.get(settings.norm)

    def attack_at(radius: float) -> tuple[float, Prediction]:
        threat = threats(eps=radius)
        x_adv = counted.attack(attack, x, y, threat, settings.seed)
        return float(threat.distance(x_adv - x)), model.predict(x_adv)[0]

    points = [(0.0, outcome.clean), (outcome.size, outcome.adversarial), *map(attack_at, grid[1:])]
    with exact_float32():
        nearest = float(distances(FMN(steps=_FMN_STEPS), counted, x.to(model.device), y, settings.norm))
    smallest = min([size for size, prediction in points if prediction.answer != label] + [nearest])
    held = max(radius for radius in grid if radius < smallest)
    for _ in range(_HALVINGS if smallest < float("inf") else 0):
        middle = (held + smallest) / 2
        points.append(attack_at(middle))
        if points[-1][1].answer != label:
            smallest = min(smallest, points[-1][0])
        else:
            held = middle
    slack = 1 + 1e-4  # a change at the ball's border, measured again in float32
    lowest = [min(p.probabilities[label] for size, p in points if size <= radius * slack + 1e-7) for radius in grid]
    return EpsilonCurve(model, grid, lowest, smallest if smallest < float("inf") else None)


class LeaderboardRow(NamedTuple):
    """One line of the leaderboard: a model with its run's record, and what was measured here, on few images.

    ``robust`` counts images that are right when clean and under the chosen attack; both are None before an attack was run.
    """

    model: PlaygroundModel
    clean: Estimate | None = None
    robust: Estimate | None = None


def recorded_leaderboard(comparison: Comparison) -> list[LeaderboardRow]:
    """Return the leaderboard as the runs' records have it, the most robust first, those without a record last."""
    rows = map(LeaderboardRow, comparison.models)
    return sorted(rows, key=lambda row: -row.model.record.robust_accuracy if row.model.record else 1.0)


def attack_leaderboard(
    comparison: Comparison, settings: AttackSettings, n: int, report: Report | None = None
) -> list[LeaderboardRow]:
    """Attack the first ``n`` test images on every model and return the leaderboard, the most robust first.

    Raises UserError if n is above 64 or the number of images, or if a model takes more than a minute.
    """
    n = integer("images", n, 1, min(MAX_IMAGES, len(comparison.images)))
    x, y = to_float(comparison.images.images[:n]), comparison.images.labels[:n]
    threat = THREATS.get(settings.norm)(eps=settings.eps)
    attack, expected = settings.option.make(settings.steps), settings.option.passes(settings.steps)
    rows = []
    for i, model in enumerate(comparison.models):

        def is_correct(x: Tensor, y: Tensor, model: PlaygroundModel = model) -> Tensor:
            return torch.tensor([prediction.answer for prediction in model.predict(x)]) == y

        clean = is_correct(x, y)
        robust = clean.clone()
        if clean.any():
            share = (i, len(comparison.models))
            counted = CountedModel(model, report, f"attacking {model.name}", expected, share)
            x_adv = counted.attack(attack, x[clean], y[clean], threat, settings.seed)
            robust[clean] = is_correct(x_adv, y[clean]) & finite_images(x_adv)
        rows.append(LeaderboardRow(model, estimate(clean.tolist()), estimate(robust.tolist())))
    return sorted(rows, key=lambda row: -row.robust.accuracy if row.robust else 1.0)
