"""Detectors of adversarial images: what they reject, and what is left when an attack knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clead.evaluation.detection import Detection
from clead.report.run import RunResult
from clead.results.figure import ESTIMATED, MUTED, Drawing, draw, estimated, head, new_axes, percent_axis, style
from clead.results.format import norm_of, percent

_ATTACKS = {"oblivious": "attack does not know it", "aware": "attack knows it"}
_NEAR = 0.05
"""The clean rejection rate at which the text alternative and the caption say what is left."""


def detection(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return curves and table of each run whose detectors were measured."""
    found = []
    for i, run in enumerate(runs):
        measured = run.measured("detect")
        if measured is None or not isinstance(result := measured.result, Detection):
            continue
        said = []
        for part in result.detectors:
            point = min(part.curve, key=lambda point: abs(point.rate - _NEAR))
            said.append(
                f"{_words(part.name)} rejects {percent(point.clean_rejected.accuracy)} of the clean images and leaves "
                f"{percent(point.oblivious.accuracy)} right or rejected, {percent(point.aware.accuracy)} if the attack knows it"
            )
        caption = (
            f"{run.name}, {result.images:,} {measured.data.split} images, {norm_of(result.norm)} ε = {result.eps_text}, attacks of "
            f"{result.steps} steps with {result.restarts} {'restart' if result.restarts == 1 else 'restarts'}; "
            f"{percent(result.robust.accuracy)} are right without a detector."
        )
        found.append(
            {
                "drawings": [
                    _draw(run, result, key, f"detection-{i + 1}-{key}", f"Detection, {what}. {caption} {'; '.join(said)}.")
                    for key, what in _ATTACKS.items()
                ],
                "name": run.name,
                "caption": caption,
                "rows": [
                    {"detector": _words(part.name), "attack": attack}
                    for part in result.detectors
                    for attack in part.attacks
                ],
                "points": [(_words(part.name), point) for part in result.detectors for point in part.curve],
            }
        )  # fmt: skip
    return found


def _draw(run: RunResult, result: Detection, attack: str, name: str, label: str) -> Drawing:
    """Draw what is right or rejected against the clean images rejected, under one of the two kinds of attacks."""
    figure, axes = new_axes(390, 270)
    rows = []
    for index, part in enumerate(result.detectors):
        color, marker, dash = style(index)
        points = sorted(part.curve, key=lambda point: point.clean_rejected.accuracy)
        x = [point.clean_rejected.accuracy for point in points]
        left = [getattr(point, attack) for point in points]
        axes.fill_between(x, [e.low for e in left], [e.high for e in left], color=color, alpha=0.12, linewidth=0)
        axes.plot(
            x, [e.accuracy for e in left], color=color, marker=marker, markersize=4, linestyle=dash, linewidth=1.7
        )
        rows += [(_words(part.name), rate, *estimated(value)) for rate, value in zip(x, left, strict=True)]
    axes.axhline(result.robust.accuracy, color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)))
    axes.annotate(
        "without a detector", (1, result.robust.accuracy), xycoords=("axes fraction", "data"), ha="right", va="top",
        xytext=(0, -3), textcoords="offset points", fontsize=9, color=MUTED,
    )  # fmt: skip
    rows.append(("none", None, *estimated(result.robust)))
    percent_axis(axes)
    axes.set_xlim(right=max(axes.get_xlim()[1], 0.1))
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    head(axes, f"{run.name}, {_ATTACKS[attack]}", "clean images rejected")
    key = [(_words(part.name), index) for index, part in enumerate(result.detectors)]
    columns = ("detector", "clean images rejected (fraction)", "right or rejected (fraction)", *ESTIMATED[1:])
    return draw(figure, name, label, columns, rows, key)


def legend(found: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return the detectors of one plot with the numbers of their styles."""
    return list(found[0]["drawings"][0].key) if found else []


def _words(name: str) -> str:
    return name.replace("_", " ")
