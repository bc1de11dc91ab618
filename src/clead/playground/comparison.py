"""What the playground computes: one image attacked on each model, how far each holds, and a small leaderboard. No page in here.

Every attack is white-box and runs on each model by itself: what breaks one model is tried on the others only to see whether it
transfers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clead.api.results import read_record
from clead.attacks.fmn import FMN
from clead.attacks.pgd import PGD
from clead.attacks.runner import check_finite, finite_images, run_attack
from clead.data.base import fingerprint
from clead.data.decoding import decode
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32
from clead.inference.models import FittedDetector, ServedModel
from clead.inference.problems import Problem
from clead.inference.request_parsing import count_pixels
from clead.inference.settings import ServeSettings
from clead.interfaces import Attack, ImageSet, Search, Threat
from clead.measurements.distances import distances
from clead.models.split import SplitModel, copied
from clead.playground.choices import (
    ATTACK_SECONDS,
    MAX_FILE,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_RUNS,
    OFFERS,
    AttackSettings,
    Radii,
    radii,
    whole,
)
from clead.results.record import Estimate, Record
from clead.results.statistics import estimate
from clead.runs.loading import evaluated_images
from clead.settings import Ratio
from clead.tasks.classification import CLASSIFICATION
from clead.threats import THREATS

Report = Callable[[float, str], None]
"""Is told how much is done, in [0, 1], and in words what is being done."""

_CURVE_STEPS = 20
_CURVE_POINTS = 8
_SEARCH_STEPS = 100
_HALVINGS = 5


@dataclass(frozen=True)
class PlaygroundModel:
    """One model of the playground: its own copy, because an attack changes a model's mode while it runs."""

    name: str
    method: str
    model: SplitModel
    detector: FittedDetector | None
    record: Record | None
    device: torch.device

    @property
    def hardened(self) -> bool:
        """Whether its training did anything against attacks."""
        return self.method != "standard"


@dataclass(frozen=True)
class Comparison:
    """All models, the test images that they share, and what may be chosen.

    Attributes:
        entrants: the first two meet side by side; all are on the leaderboard.
        images: of the evaluation, uint8.
        classes: K names.
        shape: (C, H, W).
        fit: how an image file comes to that shape.
        radii: default and largest radius by norm.
        start: what the page begins with.
    """

    entrants: tuple[PlaygroundModel, ...]
    images: ImageSet
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    served: ServedModel
    radii: Mapping[str, Radii]
    start: AttackSettings

    @property
    def pair(self) -> tuple[PlaygroundModel, ...]:
        """Return the one or two models that meet side by side."""
        return self.entrants[:2]


def open_contest(models: Mapping[str, ServedModel]) -> Comparison:
    """Return the comparison of ``models``.

    Raises UserError if there are more than eight, or if they differ in classes, shape or test images: one image is shown to all.
    """
    if not 1 <= len(models) <= MAX_RUNS:
        raise UserError(f"the playground takes 1 to {MAX_RUNS} runs, got {len(models)}; leave some out")
    first = next(iter(models.values()))
    entrants, chosen, kept, read, eps = [], None, "", {}, None
    for model in models.values():
        if (model.classes, model.shape) != (first.classes, first.shape):
            raise UserError(
                f"{model.name} knows {len(model.classes)} classes of images {model.shape}, {first.name} {len(first.classes)} of "
                f"{first.shape}; give runs of the same data"
            )
        run, trained, config = model.run, model.trained, model.config
        key = (repr(config.data), trained.train.seed, config.eval.split, config.eval.images)
        if key not in read:  # large data is read once for runs that share it
            images = evaluated_images(run, config, trained, None)[0]
            read[key] = images, fingerprint([images], model.classes)
        images, digest = read[key]
        if chosen is None:
            chosen, kept = images, digest
        elif digest != kept:
            raise UserError(
                f"{model.name} has other test images than {first.name}; give runs of the same data and split"
            )
        method = trained.to_dict()["method"]["name"]
        evaluated = (run.path / "results" / "evaluation.json").exists()
        alone = copied(model.model).requires_grad_(False).eval()
        device = next((p.device for p in alone.parameters()), torch.device("cpu"))
        record = read_record(run.path) if evaluated else None
        entrants.append(PlaygroundModel(model.name, method, alone, model.detector, record, device))
        if eps is None and (method != "standard" or len(models) == 1):
            eps = config.threat.norm, Ratio(config.threat.eps)
    norm, radius = eps or (config.threat.norm, Ratio(config.threat.eps))
    allowed = radii(first.shape, norm, radius)
    norm = norm if norm in allowed else "linf"
    start = AttackSettings(norm=norm, eps=allowed[norm].default)
    assert chosen is not None
    return Comparison(tuple(entrants), chosen, first.classes, first.shape, first, allowed, start)


def read_image(content: bytes, contest: Comparison) -> tuple[Tensor, tuple[int, int]]:
    """Return an image file as (C, H, W) uint8, resized as the training's images were, and its own (width, height).

    Raises UserError, before anything is decoded, if the file is too long, has too many pixels, or is no image.
    """
    import io

    from PIL import Image

    if len(content) > MAX_FILE:
        raise UserError(
            f"the file: at most {MAX_FILE // 2**20} MiB are read, got {len(content) / 2**20:.1f}; shrink it"
        )
    try:
        count_pixels([content], ServeSettings(max_pixels=MAX_PIXELS))
    except Problem as problem:
        if problem.status == 413:
            raise UserError(
                f"the file: an image may have {MAX_PIXELS / 1e6:g} megapixels, this one has more; shrink it"
            ) from None
        raise UserError(problem.detail.replace("image 0", "the file")) from None
    image = decode([content], ["the file"], contest.served.fit)[0]
    if tuple(image.shape) != contest.shape:
        _, height, width = contest.shape
        raise UserError(
            f"the file: the models were trained on images of {width}×{height} pixels, got {image.shape[2]}×{image.shape[1]}; "
            "resize it (only square ones are resized here)"
        )
    with Image.open(io.BytesIO(content)) as opened:
        return image, opened.size


class Prediction(NamedTuple):
    """What one model says of one image: probabilities (K,), the most probable class, and the detector's score, or None."""

    probabilities: list[float]
    answer: int
    score: float | None


@dataclass(frozen=True)
class Outcome:
    """One model under one attack.

    Attributes:
        label: what the attack drives the answer away from.
        own: whether that label is the model's own answer.
        x_adv: (C, H, W) in [0, 1]; the clean image where there was nothing to attack.
        attacked: False where the clean image was classified wrong already.
        size: of the change, in the attack's norm.
        elsewhere: what the other models answer to this model's adversarial image, by name.
    """

    name: str
    label: int
    own: bool
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


class CountedModel(nn.Module):
    """A model that counts how often it is asked, says so, and stops an attack that takes too long."""

    def __init__(self, model: nn.Module, report: Callable[[int], None], deadline: float) -> None:
        super().__init__()
        self.model, self.report, self.deadline, self.passes = model, report, deadline, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K); raises UserError once the time is up."""
        self.passes += 1
        if time.monotonic() > self.deadline:
            raise UserError("the attack took too long and was stopped; choose fewer steps, or fewer images")
        self.report(self.passes)
        return self.model(x)


def attack_image(
    entrants: Sequence[PlaygroundModel],
    image: Tensor,
    label: int | None,
    settings: AttackSettings,
    report: Report | None = None,
) -> list[Outcome]:
    """Attack ``image`` on each model by itself.

    Args:
        entrants: the models.
        image: (C, H, W) uint8.
        label: the true class; None: each model's own answer.
        settings: the attack.
        report: is told of progress.

    Each adversarial image is verified: inside the threat set, and classified again by the plain model in float32. Raises UserError
    if an attack takes longer than a minute.
    """
    x = _pixels(image[None])
    threat = THREATS.get(settings.norm)(eps=settings.eps)
    offer = OFFERS[settings.attack]
    attack = offer.make(settings.steps)
    found: list[Outcome] = []
    for place, entrant in enumerate(entrants):
        started = time.monotonic()
        clean = look(entrant, x)[0]
        aim = clean.answer if label is None else label
        x_adv, passes, attacked = x, 0, clean.answer == aim
        if attacked:
            asked = _asked(
                entrant, offer.passes(settings.steps), report, place, len(entrants), f"attacking {entrant.name}"
            )
            x_adv = _attack(attack, asked, x.to(entrant.device), torch.tensor([aim]), threat, settings.seed).cpu()
            passes = asked.passes
        found.append(
            Outcome(
                entrant.name,
                aim,
                label is None,
                clean,
                look(entrant, x_adv)[0],
                x_adv[0],
                attacked,
                float(threat.distance(x_adv - x)),
                time.monotonic() - started,
                passes,
                {other.name: look(other, x_adv)[0].answer for other in entrants if other is not entrant},
            )
        )
    return found


def look(entrant: PlaygroundModel, x: Tensor) -> list[Prediction]:
    """Return what the model and its detector say of images (n, C, H, W) in [0, 1]."""
    guard = entrant.detector
    with exact_float32(), torch.inference_mode():
        features, logits = entrant.model.features_and_logits(x.to(entrant.device))
        scores = (
            None if guard is None else guard.score(entrant.model, x.to(entrant.device), (features, logits)).tolist()
        )
    if not torch.isfinite(logits).all():
        raise UserError(f"{entrant.name} answers NaN or infinity to this image; choose another one")
    rows = logits.softmax(1).tolist()
    return [
        Prediction(row, answer, None if scores is None else scores[i])
        for i, (row, answer) in enumerate(zip(rows, CLASSIFICATION.predict(logits).tolist(), strict=True))
    ]


@dataclass(frozen=True)
class EpsilonCurve:
    """How one model's probability of the right class falls with ε on one image.

    Attributes:
        name: the model's.
        radii: rising, from 0.
        probabilities: the smallest found for the label in the ball of each radius.
        smallest: size of the smallest change found that makes the answer wrong; 0: it is wrong without one; None: none was found.
    """

    name: str
    radii: list[float]
    probabilities: list[float]
    smallest: float | None


def declines(
    entrants: Sequence[PlaygroundModel],
    image: Tensor,
    outcomes: Sequence[Outcome],
    settings: AttackSettings,
    largest: float,
    report: Report | None = None,
) -> list[EpsilonCurve]:
    """Return for each model how it gives way on ``image`` (C, H, W) uint8 as ε grows to twice the chosen one.

    At each radius PGD of 20 steps, and the chosen attack's own image at the chosen one; FMN of 100 steps looks for the smallest
    change that makes the answer wrong, and PGD halves the way down to it. A point found in a smaller ball counts in the larger
    ones, since they hold it too. ``largest``: the largest radius that is allowed.
    """
    x = _pixels(image[None])
    eps, measure = float(settings.eps), THREATS.get(settings.norm)(eps=0).distance
    top = min(2 * eps, max(largest, eps))
    grid = sorted({*(top * i / _CURVE_POINTS for i in range(_CURVE_POINTS + 1)), eps})
    found = []
    for place, (entrant, outcome) in enumerate(zip(entrants, outcomes, strict=True)):
        label, y = outcome.label, torch.tensor([outcome.label], device=entrant.device)
        asked = _asked(
            entrant,
            (len(grid) - 1 + _HALVINGS) * (_CURVE_STEPS + 1) + _SEARCH_STEPS,
            report,
            place,
            len(entrants),
            f"how far {entrant.name} holds",
        )
        points = [(0.0, outcome.clean), (outcome.size, outcome.adversarial)]
        if outcome.attacked:

            def attack_at(
                radius: float, entrant: PlaygroundModel = entrant, asked: CountedModel = asked, y: Tensor = y
            ) -> tuple[float, Prediction]:
                threat = THREATS.get(settings.norm)(eps=radius)
                attack = PGD(steps=_CURVE_STEPS, keep="best")
                x_adv = _attack(attack, asked, x.to(entrant.device), y, threat, settings.seed).cpu()
                return float(measure(x_adv - x)), look(entrant, x_adv)[0]

            points += [attack_at(radius) for radius in grid[1:]]
            with exact_float32():
                nearest = float(distances(FMN(steps=_SEARCH_STEPS), asked, x.to(entrant.device), y, settings.norm))
            smallest = min([size for size, sight in points if sight.answer != label] + [nearest])
            held = max(radius for radius in grid if radius < smallest)
            for _ in range(_HALVINGS if smallest < float("inf") else 0):
                points.append(attack_at((held + smallest) / 2))
                broken = points[-1][1].answer != label
                held, smallest = (held, min(smallest, points[-1][0])) if broken else ((held + smallest) / 2, smallest)
        else:
            smallest = 0.0
        slack = 1 + 1e-4  # a change at the ball's border, measured again in float32
        lowest = [min(s.probabilities[label] for size, s in points if size <= radius * slack + 1e-7) for radius in grid]
        found.append(EpsilonCurve(entrant.name, grid, lowest, smallest if smallest < float("inf") else None))
    return found


@dataclass(frozen=True)
class LeaderboardRow:
    """One line of the leaderboard: what was measured here, on few images, and what the run's record says, on more.

    ``held`` counts images that are right when clean and under the chosen attack; both are None before an attack was run.
    """

    name: str
    method: str
    record: Record | None
    clean: Estimate | None = None
    held: Estimate | None = None
    seconds: float = 0.0


def standings(contest: Comparison) -> list[LeaderboardRow]:
    """Return the leaderboard as the runs' records have it, the most robust first, those without a record last."""
    found = [LeaderboardRow(entrant.name, entrant.method, entrant.record) for entrant in contest.entrants]
    return sorted(found, key=lambda s: -s.record.robust_accuracy if s.record else 1.0)


def attack_leaderboard(
    contest: Comparison, settings: AttackSettings, n: int, report: Report | None = None
) -> list[LeaderboardRow]:
    """Attack the first ``n`` test images on every model and return the leaderboard, the most robust first.

    Raises UserError if n is above 64 or the number of images, or if a model takes more than a minute.
    """
    n = whole("images", n, 1, min(MAX_IMAGES, len(contest.images)))
    x, y = _pixels(contest.images.images[:n]), contest.images.labels[:n]
    threat = THREATS.get(settings.norm)(eps=settings.eps)
    offer = OFFERS[settings.attack]
    attack = offer.make(settings.steps)
    found = []
    for place, entrant in enumerate(contest.entrants):
        started = time.monotonic()
        right = torch.tensor([sight.answer for sight in look(entrant, x)]) == y
        held = right.clone()
        if right.any():
            asked = _asked(
                entrant, offer.passes(settings.steps), report, place, len(contest.entrants), f"attacking {entrant.name}"
            )
            made = _attack(attack, asked, x[right].to(entrant.device), y[right], threat, settings.seed).cpu()
            answers = torch.tensor([sight.answer for sight in look(entrant, made)])
            held[right] = (answers == y[right]) & finite_images(made)
        found.append(
            LeaderboardRow(
                entrant.name,
                entrant.method,
                entrant.record,
                estimate(right.tolist()),
                estimate(held.tolist()),
                time.monotonic() - started,
            )
        )
    return sorted(found, key=lambda s: -s.held.accuracy if s.held else 1.0)


def _asked(
    entrant: PlaygroundModel, expected: int, report: Report | None, place: int, of: int, words: str
) -> CountedModel:
    """Return the model as an attack gets it; ``expected`` passes are the ``place``-th of ``of`` equal parts of the work."""

    def passed(count: int) -> None:
        if report is not None:
            report((place + min(count / max(expected, 1), 1.0)) / of, words)

    return CountedModel(entrant.model, passed, time.monotonic() + ATTACK_SECONDS)


def _attack(attack: Attack | Search, asked: CountedModel, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
    """Return x_adv, verified to be in the threat set."""
    generator = torch.Generator(x.device).manual_seed(seed)
    with exact_float32():
        x_adv = run_attack(attack, asked, x, y.to(x.device), threat, generator=generator, checked=True, precision=None)
    check_finite(x_adv, type(attack).__name__)
    return x_adv


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255
