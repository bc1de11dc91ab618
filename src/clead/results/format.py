"""How numbers and threats are written in tables and reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from clead.results.record import Estimate, Record
from clead.results.statistics import unbalanced

NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}


def norm_of(norm: str) -> str:
    """Return ``linf`` as ``L∞``; a norm that is not known as it is."""
    return NORMS.get(norm.lower(), norm)


def percent(fraction: float, digits: int = 1) -> str:
    """Return 0.541 as ``54.1 %`` with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def interval(estimate: Estimate) -> str:
    """Return the 95 % interval as ``51.0–57.2 %``."""
    return f"{100 * estimate.low:.1f}–{percent(estimate.high)}"


def balanced_sentence(record: Record) -> str:
    """Say what the accuracies are where every class counts alike, if classes differ much in their numbers of images; or nothing."""
    if (balanced := unbalanced(record)) is None:
        return ""
    sizes = [each.n for each in record.per_class]
    return (
        f"classes have {min(sizes)} to {max(sizes)} images; where every class counts alike, "
        f"{percent(balanced.robust.accuracy)} are robust (95 % interval {interval(balanced.robust)}) and "
        f"{percent(balanced.clean.accuracy)} right when clean"
    )


def count(number: float) -> str:
    """Return 11173962 as ``11,173,962``; fractions keep one digit."""
    return f"{number:,.0f}" if float(number).is_integer() or number >= 1000 else f"{number:,.1f}"


def duration(seconds: float) -> str:
    """Return seconds as ``850 ms``, ``12.3 s``, ``4 min 5 s`` or ``2 h 3 min``."""
    space = "\N{NO-BREAK SPACE}"
    if seconds < 1:
        return f"{1000 * seconds:.0f}{space}ms"
    if seconds < 60:
        return f"{seconds:.1f}{space}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{space}min{space}{rest}{space}s"
    return f"{minutes // 60:,}{space}h{space}{minutes % 60}{space}min"


def settings_text(values: Mapping[str, Any]) -> str:
    """Return settings as ``steps 50, loss dlr``; what is not set is left out."""
    parts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            parts.append(settings_text(value))
        elif value is not None:
            listed = value if isinstance(value, (list, tuple)) else [value]
            text = " + ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in listed)
            parts.append(f"{key.replace('_', ' ')}\N{NO-BREAK SPACE}{text}")
    return ", ".join(filter(None, parts)) or "–"


def size(bytes_: int) -> str:
    """Return 536870912 as ``512 MiB``."""
    space, mebibytes = "\N{NO-BREAK SPACE}", bytes_ / 2**20
    return f"{mebibytes:,.0f}{space}MiB" if mebibytes < 1000 else f"{mebibytes / 1024:,.1f}{space}GiB"


def p_value(p: float) -> str:
    """Return a p-value with two digits, or ``< 0.001``."""
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def threat_of(record: Record) -> str:
    """Return norm and radius as ``L∞ ε = 8/255``."""
    text = f"{norm_of(record.threat.norm)} ε = {record.threat.eps_text}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def first_sentence(text: str) -> str:
    """Return the first sentence of an explanation, with its full stop."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip(), maxsplit=1)[0].rstrip(".") + "."
