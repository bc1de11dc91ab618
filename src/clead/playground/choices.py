"""What a visitor may choose: attacks, norms, radii, steps; each value is checked here, whatever the page's widgets allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

from torch import Tensor

from clead.attacks.apgd import APGD
from clead.attacks.fab import FAB
from clead.attacks.fgsm import FGSM
from clead.attacks.pgd import PGD
from clead.attacks.square import Square
from clead.errors import UserError
from clead.interfaces import Attack, Objective, Search, Threat
from clead.results.format import norm_of
from clead.settings import Ratio, setting, settings, validated

MAX_STEPS = 200
MAX_SEED = 2**31 - 1
MAX_IMAGES = 64
"""Test images that the leaderboard attacks at once, at most."""
MAX_FILE = 8 * 2**20
MAX_PIXELS = 25_000_000
MAX_RUNS = 8
ATTACK_SECONDS = 60.0
"""After so long an attack is given up; the leaderboard has so long for each of its models."""
MAX_QUERY = 500
_QUERIES = 25

AttackName = Literal["noise", "fgsm", "pgd", "apgd", "fab", "square"]
NormName = Literal["linf", "l2", "l1"]


class _Noise:
    """A random point of the threat set: no attack, but what an attack must beat."""

    def __call__(self, objective: Objective, x: Tensor, threat: Threat, *, generator: Any = None) -> Tensor:
        return threat.random_start(x, generator=generator)


@dataclass(frozen=True)
class AttackOption:
    """One attack of the list.

    Attributes:
        label: its name on the page.
        about: what it does, in a sentence.
        steps: what a step is, or empty where there is none to choose.
        make: the attack for so many steps.
        passes_per_step: about how often a model is asked in a step; the progress bar is drawn from it.
        min_steps: fewest steps.
    """

    label: str
    about: str
    steps: str
    make: Callable[[int], Attack | Search]
    passes_per_step: int = 1
    min_steps: int = 1

    def passes(self, steps: int) -> int:
        """Return about how often a model is asked."""
        return self.passes_per_step * (steps if self.steps else 1) + 1

    @property
    def steps_label(self) -> str:
        """What stands above the slider for steps."""
        return f"Steps: {self.steps}" if self.steps else "Steps: this attack has none"


ATTACK_OPTIONS: dict[str, AttackOption] = {
    "pgd": AttackOption(
        "PGD – many small steps",
        "Follows the model's own gradient uphill in small steps and stays within ε. The plain strong attack.",
        "gradient steps",
        lambda steps: PGD(steps=steps, keep="best"),
    ),
    "apgd": AttackOption(
        "APGD – finds its own step size",
        "PGD that adapts its step size as it goes: the first attack of AutoAttack, the field's standard.",
        "gradient steps",
        lambda steps: APGD(steps=steps),
        min_steps=4,  # the radius of L1 shrinks in three stages
    ),
    "fgsm": AttackOption(
        "FGSM – a single step",
        "One step along the gradient, as far as ε allows: the oldest and weakest of the gradient attacks.",
        "",
        lambda steps: FGSM(),
    ),
    "fab": AttackOption(
        "FAB – the nearest wrong answer",
        "Looks for the closest image that one of the three most likely wrong classes gets; counts if it is within ε.",
        "steps for each of the three classes",
        lambda steps: FAB(steps=steps, targets=3),
        passes_per_step=3,
    ),
    "square": AttackOption(
        "Square – only asks questions",
        f"Sees no gradient, only the model's answers: changes random squares and keeps what helps; {_QUERIES} questions a step.",
        f"times {_QUERIES} questions",
        lambda steps: Square(queries=_QUERIES * steps),
        passes_per_step=_QUERIES,
    ),
    "noise": AttackOption(
        "Random noise – no attack at all",
        "Moves every pixel at random within ε. Nothing is aimed, so models rarely mind: compare it with an attack.",
        "",
        lambda steps: _Noise(),
    ),
}

NORM_RULES: dict[str, str] = {
    "linf": "no pixel may change by more than ε",
    "l2": "the length of the whole change is at most ε (root of the summed squares over all pixels)",
    "l1": "the summed change over all pixels is at most ε",
}


@settings
class AttackSettings:
    """One attack as chosen on the page, or in a link."""

    attack: AttackName = setting("pgd", "which attack")
    norm: NormName = setting("linf", "how the size of a change is measured")
    eps: Ratio = setting(Ratio("8/255"), "largest change, in that norm", unit="pixels in [0, 1]", gt=0)
    steps: int = setting(50, "steps of the attack", ge=1, le=MAX_STEPS)
    seed: int = setting(0, "of what is drawn at random", ge=0, le=MAX_SEED)

    @property
    def option(self) -> AttackOption:
        """The attack as it stands in the list."""
        return ATTACK_OPTIONS[self.attack]

    @property
    def in_255ths(self) -> bool:
        """Whether ε was written in 255ths."""
        return self.eps.text.endswith("/255")


KEYS = ("attack", "norm", "eps", "steps", "seed")
"""The settings, in the order of the page and of links."""


class Radii(NamedTuple):
    """The radius that a norm's slider starts at, and the largest that is allowed."""

    default: Ratio
    largest: float


def radii(shape: tuple[int, int, int], norm: str, eps: Ratio) -> dict[str, Radii]:
    """Return the radii of each norm for images of ``shape``, from the threat that the hardened model was trained against.

    L2 and L1 balls have no size that equals an L∞ ball's; a third of its corner's distance, and a tenth, are near the radii in use.
    """
    numbers = shape[0] * shape[1] * shape[2]
    side = float(eps) if norm == "linf" else 8 / 255
    by_norm = {
        # Grey images of digits stand more than photographs before people see it.
        "linf": Radii(Ratio("8/255"), 0.5 if shape[0] == 1 else 64 / 255),
        "l2": Radii(Ratio(round(side * numbers**0.5 / 3, 2)), round(0.25 * numbers**0.5, 2)),
        "l1": Radii(Ratio(round(side * numbers / 10, 2)), round(0.1 * numbers, 1)),
    }
    if norm in by_norm:
        by_norm[norm] = Radii(eps, max(by_norm[norm].largest, float(eps)))
    return by_norm


def checked(values: Mapping[str, Any], allowed: Mapping[str, Radii]) -> AttackSettings:
    """Return settings; raises UserError, one sentence, on anything unknown or out of range."""
    limits = {"steps": (1, MAX_STEPS), "seed": (0, MAX_SEED)}
    integers = {key: integer(key, values[key], *limits[key]) for key in limits if key in values}
    result = validated(AttackSettings, {**values, **integers})
    largest, name = allowed[result.norm].largest, norm_of(result.norm)
    if not result.eps <= largest:
        raise UserError(
            f"eps: must be at most {largest:.4g} for {name} on these images, got {result.eps.text}; choose less"
        )
    if result.steps < result.option.min_steps:
        raise UserError(
            f"steps: {result.attack} needs at least {result.option.min_steps} steps, got {result.steps}; choose more"
        )
    return result


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number in [low, high]; raises UserError for anything else, such as None, text or 1.5."""
    try:
        number = int(value)
        if low <= number <= high and number == float(value) and not isinstance(value, bool):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{name}: must be a whole number from {low} to {high}, got {str(value)[:40]!r}; change it")


def query(settings: AttackSettings, image: int | None, truth: str | None) -> str:
    """Return ``?image=…&attack=…``, the part of a link that says what was chosen; an image that was uploaded is not in it.

    truth: a class other than the test image's own, ``""`` for the model's own answer, None: nothing of the kind was chosen.
    """
    values: dict[str, Any] = {"image": image, "class": truth} | {key: getattr(settings, key) for key in KEYS}
    return "?" + urlencode({key: value for key, value in values.items() if value is not None}, safe="/")


class Linked(NamedTuple):
    """What a link says: the settings, the test image's number, and the class as in ``query``."""

    settings: AttackSettings
    image: int | None
    truth: str | None


def read_query(
    given: Mapping[str, str], allowed: Mapping[str, Radii], images: int, classes: tuple[str, ...], start: AttackSettings
) -> Linked | None:
    """Return what the query of a link says, ``start`` where it says nothing; None if it says nothing at all.

    Keys that are not the playground's are left alone. Raises UserError if a value is not allowed.
    """
    known = {key: str(given[key]) for key in (*KEYS, "image", "class") if key in given}
    if not known:
        return None
    if sum(map(len, known.values())) > MAX_QUERY:
        raise UserError(f"the link is longer than {MAX_QUERY} characters, which none of this page's is; copy it again")
    values: dict[str, Any] = {key: known.get(key, getattr(start, key)) for key in KEYS}
    if "eps" not in known and known.get("norm") in allowed:
        values["eps"] = allowed[known["norm"]].default
    image = integer("image", known["image"], 0, images - 1) if "image" in known else None
    truth = known.get("class")
    if truth and truth not in classes:
        raise UserError(f"class: the models know no such class, got {truth[:40]!r}; choose one from the list")
    return Linked(checked(values, allowed), image, truth)
