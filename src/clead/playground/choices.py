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
from clead.settings import Ratio, setting, settings, validated

MAX_STEPS = 200
MAX_IMAGES = 64
"""Test images that the leaderboard attacks at once, at most."""
MAX_FILE = 8 * 2**20
MAX_PIXELS = 25_000_000
MAX_RUNS = 8
ATTACK_SECONDS = 60.0
"""After so long an attack is given up; the leaderboard has so long for each of its models."""
LONGEST_QUERY = 500
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
        words: what it does, in a sentence.
        steps: what a step is, or empty where there is none to choose.
        make: the attack for so many steps.
        passes: about how often a model is asked meanwhile; the progress bar is drawn from it.
        least: fewest steps.
    """

    label: str
    words: str
    steps: str
    make: Callable[[int], Attack | Search]
    passes: Callable[[int], int]
    least: int = 1


OFFERS: dict[str, AttackOption] = {
    "pgd": AttackOption(
        "PGD – many small steps",
        "Follows the model's own gradient uphill in small steps and stays within ε. The plain strong attack.",
        "gradient steps",
        lambda steps: PGD(steps=steps, keep="best"),
        lambda steps: steps + 1,
    ),
    "apgd": AttackOption(
        "APGD – finds its own step size",
        "PGD that adapts its step size as it goes: the first attack of AutoAttack, the field's standard.",
        "gradient steps",
        lambda steps: APGD(steps=steps),
        lambda steps: steps + 1,
        least=4,  # the radius of L1 shrinks in three stages
    ),
    "fgsm": AttackOption(
        "FGSM – a single step",
        "One step along the gradient, as far as ε allows: the oldest and weakest of the gradient attacks.",
        "",
        lambda steps: FGSM(),
        lambda steps: 2,
    ),
    "fab": AttackOption(
        "FAB – the nearest wrong answer",
        "Looks for the closest image that one of the three most likely wrong classes gets; counts if it is within ε.",
        "steps for each of the three classes",
        lambda steps: FAB(steps=steps, targets=3),
        lambda steps: 3 * steps + 1,
    ),
    "square": AttackOption(
        "Square – only asks questions",
        f"Sees no gradient, only the model's answers: changes random squares and keeps what helps; {_QUERIES} questions a step.",
        f"times {_QUERIES} questions",
        lambda steps: Square(queries=_QUERIES * steps),
        lambda steps: _QUERIES * steps,
    ),
    "noise": AttackOption(
        "Random noise – no attack at all",
        "Moves every pixel at random within ε. Nothing is aimed, so models rarely mind: compare it with an attack.",
        "",
        lambda steps: _Noise(),
        lambda steps: 1,
    ),
}

NORM_WORDS: dict[str, tuple[str, str]] = {
    "linf": ("L∞", "no pixel may change by more than ε"),
    "l2": ("L2", "the length of the whole change is at most ε (root of the summed squares over all pixels)"),
    "l1": ("L1", "the summed change over all pixels is at most ε"),
}


@settings
class AttackSettings:
    """One attack as chosen on the page, or in a link."""

    attack: AttackName = setting("pgd", "which attack")
    norm: NormName = setting("linf", "how the size of a change is measured")
    eps: Ratio = setting(Ratio("8/255"), "largest change, in that norm", unit="pixels in [0, 1]", gt=0)
    steps: int = setting(50, "steps of the attack", ge=1, le=MAX_STEPS)
    seed: int = setting(0, "of what is drawn at random", ge=0, le=2**31 - 1)


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
    found = {
        # Grey images of digits stand more than photographs before people see it.
        "linf": Radii(eps if norm == "linf" else Ratio("8/255"), 0.5 if shape[0] == 1 else 64 / 255),
        "l2": Radii(Ratio(round(side * numbers**0.5 / 3, 2)), round(0.25 * numbers**0.5, 2)),
        "l1": Radii(Ratio(round(side * numbers / 10, 2)), round(0.1 * numbers, 1)),
    }
    if norm in found:
        found[norm] = Radii(eps, max(found[norm].largest, float(eps)))
    return found


def chosen(values: Mapping[str, Any], allowed: Mapping[str, Radii]) -> AttackSettings:
    """Return checked settings; raises UserError, one sentence, on anything unknown or out of range."""
    found = validated(AttackSettings, dict(values))
    largest = allowed[found.norm].largest
    if not found.eps <= largest:
        raise UserError(
            f"eps: must be at most {largest:.4g} for {NORM_WORDS[found.norm][0]} on these images, got {found.eps.text}; choose less"
        )
    least = OFFERS[found.attack].least
    if found.steps < least:
        raise UserError(f"steps: {found.attack} needs at least {least} steps, got {found.steps}; choose more")
    return found


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number in [least, most]; raises UserError for anything else, such as None, text or 1.5."""
    try:
        number = int(value)
        right = least <= number <= most and number == float(value) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        right, number = False, 0
    if not right:
        raise UserError(f"{name}: must be a whole number from {least} to {most}, got {str(value)[:40]!r}; change it")
    return number


def query(settings: AttackSettings, image: int | None, truth: str | None) -> str:
    """Return ``?image=…&attack=…``, the part of a link that says what was chosen; an image that was uploaded is not in it.

    truth: a class other than the test image's own, ``""`` for the model's own answer, None: nothing of the kind was chosen.
    """
    parts: dict[str, Any] = {} if image is None else {"image": image}
    if truth is not None:
        parts["class"] = truth
    parts |= {
        "attack": settings.attack,
        "norm": settings.norm,
        "eps": settings.eps.text,
        "steps": settings.steps,
        "seed": settings.seed,
    }
    return "?" + urlencode(parts, safe="/")


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
    keys = ("attack", "norm", "eps", "steps", "seed")
    known = {key: str(given[key]) for key in (*keys, "image", "class") if key in given}
    if not known:
        return None
    if sum(map(len, known.values())) > LONGEST_QUERY:
        raise UserError(
            f"the link is longer than {LONGEST_QUERY} characters, which none of this page's is; copy it again"
        )
    values: dict[str, Any] = {key: getattr(start, key) for key in keys}
    values |= {key: known[key] for key in keys if key in known}
    if "norm" in known and "eps" not in known and known["norm"] in allowed:
        values["eps"] = allowed[known["norm"]].default
    for key, most in (("steps", MAX_STEPS), ("seed", 2**31 - 1)):
        values[key] = whole(key, values[key], 1 if key == "steps" else 0, most)
    image = whole("image", known["image"], 0, images - 1) if "image" in known else None
    truth = known.get("class")
    if truth and truth not in classes:
        raise UserError(f"class: the models know no such class, got {truth[:40]!r}; choose one from the list")
    return Linked(chosen(values, allowed), image, truth)
