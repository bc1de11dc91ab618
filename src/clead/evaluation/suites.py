"""The suites: which attacks make the worst case, with the constants of their protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clead.attacks.apgd import APGD
from clead.attacks.capabilities import attack_name, capabilities
from clead.attacks.fab import FAB
from clead.attacks.fgsm import FGSM
from clead.attacks.masks import MaskAPGD
from clead.attacks.pgd import PGD
from clead.attacks.rays import RayS
from clead.attacks.square import Square
from clead.config.schema import TASK_SUITES
from clead.errors import UserError
from clead.interfaces import Attack, Search
from clead.renamed import current_value
from clead.results.record import Record
from clead.settings import Ratio
from clead.tasks import Task
from clead.tasks.classification import TOWARDS_CLASS

SUITE_TITLES: dict[str, str] = {
    "standard": "AutoAttack standard",
    "plus": "AutoAttack plus",
    "rand": "AutoAttack rand",
    "quick": "quick suite, not AutoAttack",
    "adaptive": "AutoAttack standard and attacks on the embedding",
    "black_box": "attacks by queries only",
    "pgd": "FGSM and PGD, not AutoAttack",
    "sea": "SEA",
    "sea-quick": "quick suite, not SEA",
    "attacks": "the attacks listed, not AutoAttack",
}
NOT_AUTOATTACK = ", not AutoAttack"
_NOT_SEA = ", not SEA"
_AUTOATTACK = ("standard", "plus", "adaptive", "rand")
_OWN_STEPS = " instead of the suite's own"
_NAMED_ATTACKS = 4
_WITHOUT_DLR = ("black_box", "pgd", *TASK_SUITES["segmentation"])
_QUICK_GAP = (
    "the quick suite left 0.0 to 0.5 points more than AutoAttack standard on this project's five committed models"
)
LOWER_PRECISION = "the search was in"
DRAWS = 20
"""Clean and adversarial images of a randomised model (suite rand) are scored by the majority of so many draws."""


@dataclass(frozen=True)
class NamedAttack:
    """An attack and what it maximises, under the name that tables show.

    Attributes:
        name: shown in tables.
        attack: how.
        objective: what; a search has none.
        cost: forward passes and backward passes of an image that never breaks; the progress bar is drawn from it.
        target: the class to aim at, if there is one: then an image is broken only where it is taken for that class.
    """

    name: str
    attack: Attack | Search
    objective: str = "cross_entropy"
    cost: float = 100.0
    target: int | None = None

    def goal(self, task: Task, y: Tensor) -> tuple[Task, Tensor]:
        """Return what is right while this attack runs, and the targets of it: the labels, or the class to aim at, (B,)."""
        return (task, y) if self.target is None else (TOWARDS_CLASS, torch.full_like(y, self.target))


def describe(named: NamedAttack) -> dict[str, Any]:
    """Return an attack's settings as plain data, for the record and for comparing two evaluations."""
    attack = named.attack
    objective: dict[str, Any] = {} if capabilities(attack).searches else {"objective": named.objective}
    objective |= {} if named.target is None else {"target": named.target}
    if isinstance(description := getattr(attack, "description", None), dict):
        return {**objective, "attack": type(attack).__name__, **description}
    if not is_dataclass(attack) or isinstance(attack, type):
        return {**objective, "attack": type(attack).__name__}
    values = asdict(attack)
    return {**objective, **{key: value.text if isinstance(value, Ratio) else value for key, value in values.items()}}


def suite(
    name: str, norm: str, num_classes: int, *, steps: int | None = None, task: str = "classification"
) -> tuple[list[NamedAttack], list[str]]:
    """Return the attacks of a suite, in order, and notes on what the number of classes made of the protocol.

    ``standard`` is AutoAttack (Croce & Hein 2020, arXiv:2003.01690, section 6; L1: Croce & Hein 2021, arXiv:2103.01208):
    APGD-CE, APGD-T, FAB-T, Square. ``plus`` and ``rand`` are its longer and its randomised version. ``quick`` has half the
    steps of APGD-CE and APGD-T, three targets, and neither FAB nor Square. ``black_box`` is Square, and in L∞ RayS after it, which
    uses labels only (Chen & Gu 2020, arXiv:2006.12792), with as many queries. ``sea`` is for masks (Croce, Singh & Hein 2023,
    arXiv:2306.12941): Auto-PGD of 300 steps on three losses of pixels, each on all images.

    Args:
        name: a ``SuiteName``.
        norm: linf, l2 or l1; ``pgd`` also takes l0.
        num_classes: K ≥ 2. There is no targeted DLR below 4 classes, and no DLR at all for 2: the margin stands in.
        steps: instead of every attack's own; Square and RayS get 50 queries for each.
        task: whose suite it must be.

    Raises UserError if the suite is not defined for the norm, or is another task's.
    """
    name = current_value("eval.suite", name)
    _check_task(name, task)
    if norm not in ("linf", "l2", "l1") and name != "pgd":
        raise UserError(f"suite {name} is defined for linf, l2 and l1, got {norm}; use --eval.suite pgd")
    targets = min(5 if norm == "l1" else 9, num_classes - 1)
    restarts = 5 if norm == "l1" else 1
    notes = []
    if targets < (5 if norm == "l1" else 9) and name in ("standard", "plus", "adaptive"):
        notes.append(f"{num_classes} classes: {targets} target{'s' if targets > 1 else ''} instead of the protocol's")
    if num_classes == 3 and name not in _WITHOUT_DLR:
        notes.append("3 classes: the targeted DLR loss is not defined, APGD-T maximises the targeted margin")
    if num_classes == 2 and name not in _WITHOUT_DLR:
        notes.append("2 classes: the DLR loss is not defined, the margin stands in for it")
    ce = APGD(restarts=restarts)
    dlr = APGD(loss="dlr" if num_classes > 2 else "margin")
    targeted = APGD(loss="dlr" if num_classes > 3 else "margin", targets=targets)
    fab, square = FAB(targets=min(9, num_classes - 1)), Square()
    labels_only = [RayS(queries=square.queries)] if norm == "linf" else []
    if name == "black_box" and not labels_only:
        notes.append(f"suite black_box in {norm} is Square alone: RayS, which uses labels only, is an attack for linf")
    attacks: list[Attack | Search] = {
        "standard": [ce, targeted, fab, square],
        "adaptive": [ce, targeted, fab, square],
        "plus": [
            replace(ce, restarts=5),
            replace(dlr, restarts=5),
            FAB(targets=0, restarts=5),
            square,
            targeted,
            fab,
        ],
        "rand": [APGD(eot=20), replace(dlr, eot=20)],
        "quick": [APGD(steps=50), replace(targeted, steps=50, targets=min(3, targets))],
        "black_box": [square, *labels_only],
        "pgd": [FGSM()],
        "sea": _sea(300),
        "sea-quick": _sea(60),
    }[name]
    pgd = PGD(steps=50, keep="best")
    pairs: list[tuple[Attack | Search, str]] = [(attack, "cross_entropy") for attack in attacks]
    if name == "pgd":
        pairs += [(pgd, "cross_entropy"), (pgd, "margin")]
    if name == "adaptive":
        embedding = ("embedding", "embedding_logits", "contrastive", "prototype")
        pairs += [(replace(pgd, steps=100), objective) for objective in embedding]
    named, changed = [], False
    for attack, objective in pairs:
        shortened = attack
        if steps is not None:
            values = vars(attack)
            changes = {key: steps * times for key, times in (("steps", 1), ("queries", 50)) if key in values}
            shortened = replace(attack, **changes) if changes else attack  # ty: ignore[invalid-argument-type]
            changed = changed or shortened != attack
        named.append(NamedAttack(attack_name(shortened, objective), shortened, objective, _cost(shortened)))
    if name == "quick" and not changed:
        notes.append(_QUICK_GAP)
    if changed:
        notes.append(f"{steps} step{'s' if steps != 1 else ''}{_OWN_STEPS}")
    return named, notes


def _check_task(name: str, task: str) -> None:
    """Raise UserError unless suite ``name`` is one of the task's."""
    of_another = next((other for other, names in TASK_SUITES.items() if name in names and other != task), None)
    if of_another or (task in TASK_SUITES and name not in TASK_SUITES[task]):
        raise UserError(
            f"suite {name} is for the task {of_another or 'classification'}, and this is {task}; "
            f"use --eval.suite {TASK_SUITES.get(task, ('standard',))[0]}"
        )


def _sea(steps: int) -> list[Attack | Search]:
    """Return Auto-PGD on the losses of SEA; what weighs classes alike looks for a low mIoU."""
    return [
        MaskAPGD(steps=steps),
        MaskAPGD(steps=steps, loss="balanced_masked_cross_entropy", keep="mean_iou"),
        MaskAPGD(steps=steps, loss="js_divergence"),
    ]


def _cost(attack: Attack | Search) -> float:
    values = vars(attack)
    if "queries" in values:
        return values["queries"] * values.get("restarts", 1)
    runs = max(values.get("targets", 0), 1) * values.get("restarts", 1) * values.get("eot", 1)
    return capabilities(attack).passes_per_step * values.get("steps", 1) * runs


def other_steps(record: Record) -> str:
    """Return such as ``20 steps`` if the attacks did not have the suite's own, else nothing."""
    return next((note.removesuffix(_OWN_STEPS) for note in record.notes if note.endswith(_OWN_STEPS)), "")


def is_autoattack(record: Record) -> bool:
    """Say whether it was the usual yardstick, AutoAttack or of masks SEA, with its own steps, searched in float32."""
    lower = any(note.startswith(LOWER_PRECISION) for note in record.notes)
    return record.suite in (*_AUTOATTACK, "sea") and not other_steps(record) and not lower


def in_words(record: Record) -> str:
    """Return what the figures were measured under; it ends in ``not AutoAttack`` where it was not, by name or by steps."""
    names = [attack.name for attack in record.attacks]
    if not names:
        return "no attack"
    if record.suite in ("pgd", "attacks"):
        several = len(names) > _NAMED_ATTACKS
        text = f"{len(names)} attacks, each on all images" if several else listed(names)
    elif steps := other_steps(record):
        text = f"suite {record.suite} with {steps} instead of its own"
    else:
        text = SUITE_TITLES.get(record.suite, f"suite {record.suite}").removesuffix(NOT_AUTOATTACK)
    other = f", not {yardstick(record)}"
    return text if is_autoattack(record) or text.endswith(other) else text + other


def yardstick(record: Record) -> str:
    """Return the name of the usual protocol for what was evaluated."""
    masks = record.task in TASK_SUITES or any(record.suite in names for names in TASK_SUITES.values())
    return "SEA" if masks else "AutoAttack"


def listed(names: Sequence[str]) -> str:
    """Return a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def suite_label(record: Record) -> str:
    """Return the suite, to stand beside a figure that is not AutoAttack's; nothing for one that is."""
    return "" if is_autoattack(record) else in_words(record)


def under_suite(record: Record) -> str:
    """Return the suite as a clause after ``under``, with its commas."""
    text = in_words(record)
    for end in (NOT_AUTOATTACK, _NOT_SEA):
        head = text.removesuffix(end)
        if head != text and re.search(r"\bsuite\b", head):
            return f"the {head}, which is{end[1:]},"
    return f"{text},"
