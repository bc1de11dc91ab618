"""What an attack can and what it needs, as its class states it: callers ask here and never for the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clead.errors import UserError
from clead.threats import THREATS


@dataclass(frozen=True)
class Capabilities:
    """The class attributes of an attack; what a class does not state has the default, or follows from its methods.

    Attributes:
        norms: norms that it is made for; None: any.
        needs_gradient: whether it takes the gradient of the model to the images.
        minimum_norm: whether it looks for the nearest adversarial image (has ``minimal``), so that it needs no radius.
        targeted: whether it can aim at a given class.
        deterministic: whether it draws nothing, so that a seed changes nothing.
        returns_clean: whether it returns the image itself where it failed.
        searches: whether it looks for a mistake by itself (has ``perturb``) instead of climbing an objective.
        passes_per_step: forward and backward passes of a step, for the progress bar.
        per_pixel: whether it is for masks, of which no image is wrong as a whole; what climbs an objective can always be.
        unrestricted: whether it has a set of allowed images of its own instead of a norm ball (has ``worst`` and ``allows``).
    """

    norms: tuple[str, ...] | None = None
    needs_gradient: bool = True
    minimum_norm: bool = False
    targeted: bool = False
    deterministic: bool = False
    returns_clean: bool = False
    searches: bool = False
    per_pixel: bool = False
    unrestricted: bool = False
    passes_per_step: int = 2


SHORT = {"cross_entropy": "CE", "dlr": "DLR"}
"""Objectives as the names of attacks have them."""
_METHODS = {"minimum_norm": "minimal", "searches": "perturb", "unrestricted": "worst"}


def capabilities(attack: Any) -> Capabilities:
    """Return what ``attack``, an object or its class, can and needs."""
    stated: dict[str, Any] = {key: hasattr(attack, method) for key, method in _METHODS.items()}
    stated |= {key: getattr(attack, key) for key in Capabilities.__dataclass_fields__ if hasattr(attack, key)}
    return Capabilities(**stated)


def name_of(attack: Any) -> str:
    """Return what messages call an attack."""
    return getattr(attack, "name", None) or type(attack).__name__


def attack_name(attack: Any, objective: str = "cross_entropy") -> str:
    """Return the name that tables show, such as ``PGD-50×5 margin`` or ``APGD-T``: the attack's own ``label``, if it has one."""
    short = SHORT.get(objective, objective)
    label = getattr(attack, "label", None)
    if label is not None:
        return label(short) if callable(label) else label
    if capabilities(attack).searches:
        return name_of(attack)
    return f"{type(attack).__name__} {short}"


def times(number: int) -> str:
    """Return ``×5``, or nothing for 1."""
    return f"×{number}" if number > 1 else ""


def weakness_warning(attack: Any, threat: Any) -> str | None:
    """Return why the attack is weak against ``threat`` by its settings alone, if its class can tell and it is."""
    warn = getattr(attack, "weakness_warning", None)
    return None if warn is None else warn(threat)


def check_norm(attack: Any, norm: str) -> None:
    """Raise UserError if the attack is not made for ``norm``."""
    norms = None if isinstance(attack, type) else capabilities(attack).norms
    if norms is not None and norm not in norms:
        THREATS.get(norm)  # a norm that there is not is said to be that
        raise UserError(
            f"{name_of(attack)} is an attack for {', '.join(norms)}, got {norm}; "
            f"give --threat.norm {norms[0]}, or another attack"
        )
