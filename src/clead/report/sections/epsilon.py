"""Robust accuracy against the radius: the evaluation's curve, and that of the attacks for the smallest perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clead.evaluation.suites import suite_label
from clead.report.run import RunResult
from clead.results.figure import DASHES, ESTIMATED, MUTED, Drawing, draw, estimated, head, new_axes, percent_axis, style
from clead.results.format import norm_of, percent
from clead.results.record import Estimate, ThreatModel
from clead.results.section import DistanceCurves
from clead.results.statistics import estimate

_DOTTED: tuple[Any, ...] = ((0, (1, 1.3)), (0, (1, 2.2)), (0, (3, 1.2, 1, 1.2)), (0, (5, 1.2, 1, 1.2, 1, 1.2)))


@dataclass(frozen=True)
class Line:
    """One attack on one run: robust accuracy at rising radii, a step function where ``distances`` are known per image."""

    run: int
    attack: str
    points: list[tuple[float, Estimate]]
    distances: list[float | None] | None = None

    def at(self, eps: float) -> Estimate | None:
        """Return robust accuracy at a radius, None if it was not measured there."""
        if self.distances is not None:
            return _beyond(self.distances, eps)
        return next((value for radius, value in self.points if radius == eps), None)


def epsilon(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return one plot and one table of robust accuracy against ε per norm."""
    norms = [run.record.threat.norm.lower() for run in runs if run.record.curve]
    norms += [curves.norm.lower() for run in runs for curves, _ in _distances(run)]
    return [_norm(runs, norm, f"epsilon-{norm}") for norm in dict.fromkeys(norms)]


def _norm(runs: Sequence[RunResult], norm: str, name: str) -> dict[str, Any]:
    texts: dict[float, str] = {}
    for run in runs:
        if run.record.threat.norm.lower() == norm:
            texts |= {run.record.threat.eps: run.record.threat.eps_text}
            texts |= {point.eps: point.eps_text for point in run.record.curve}
        else:
            texts |= {threat.eps: threat.eps_text for _, threat in _distances(run) if threat}
    limit = max(max(texts), 2 * min(texts)) if texts else 1.0
    lines = [line for i, run in enumerate(runs) for line in _lines(i, run, norm, limit)]
    indices = list(dict.fromkeys(line.run for line in lines))
    trained = {t[0]: t[1] for i in indices if (t := runs[i].trained_radius()) and t[2] == norm}
    shown = {eps: text for eps, text in texts.items() if eps > 0}
    rows = []
    for eps in sorted(shown):
        for attack in dict.fromkeys(line.attack for line in lines):
            values = [
                next((line.at(eps) for line in lines if (line.run, line.attack) == (i, attack)), None) for i in indices
            ]
            if any(values):
                rows.append((shown[eps], attack, values))
    ends = "; ".join(
        f"{runs[line.run].name} under {line.attack}: {percent(line.points[0][1].accuracy)} at ε = {line.points[0][0]:.3g}, "
        f"{percent(line.points[-1][1].accuracy)} at ε = {texts.get(line.points[-1][0], format(line.points[-1][0], '.3g'))}"
        for line in lines
    )
    label = f"Robust accuracy against ε ({norm_of(norm)}). {ends}."
    attacked = [runs[i].record for i in indices if runs[i].record.threat.norm.lower() == norm]
    return {
        "drawing": _draw(runs, lines, norm, {0.0: "0", **texts}, trained, name, label),
        "norm": norm_of(norm),
        "names": [(i, runs[i].name) for i in indices],
        "rows": rows,
        "attacks": list(dict.fromkeys(line.attack for line in lines if line.distances is None)),
        "smallest": list(dict.fromkeys(line.attack for line in lines if line.distances is not None)),
        "counts": sorted({line.points[-1][1].n for line in lines}),
        "worst": bool(attacked),
        "labels": list(dict.fromkeys(text for record in attacked if (text := suite_label(record)))),
    }


def _lines(index: int, run: RunResult, norm: str, limit: float) -> list[Line]:
    """Return the lines of one run up to radius ``limit``, which every known distance function reaches."""
    record, lines = run.record, []
    if record.threat.norm.lower() == norm:
        for attack in dict.fromkeys(point.attack for point in record.curve):
            on_curve = sorted((point for point in record.curve if point.attack == attack), key=lambda point: point.eps)
            points = [(point.eps, point.robust) for point in on_curve]
            if points[0][0] > 0:
                points.insert(0, (0.0, record.clean))
            lines.append(Line(index, attack, points))
    for curves, _ in _distances(run):
        if curves.norm.lower() == norm:
            radii = sorted({0.0, limit, *(radius for radius in curves.radii if radius <= limit)})
            for attack, distances in curves.attacks.items():
                lines.append(Line(index, attack, [(eps, _beyond(distances, eps)) for eps in radii], distances))
    return lines


def _distances(run: RunResult) -> list[tuple[DistanceCurves, ThreatModel | None]]:
    """Return what measurements say of the distances to wrong answers, each with its threat."""
    records = [record for kind in run.measurements if (record := run.measured(kind))]
    return [(curves, record.threat) for record in records if (curves := record.result.distance_curves())]


def _beyond(distances: Sequence[float | None], eps: float) -> Estimate:
    """Return the fraction of images whose smallest known perturbation is larger than ``eps``."""
    return estimate([distance is None or distance > eps for distance in distances])


def _draw(
    runs: Sequence[RunResult],
    lines: Sequence[Line],
    norm: str,
    texts: dict[float, str],
    trained: Mapping[float, str],
    name: str,
    label: str,
) -> Drawing:
    """Draw every line with its Wilson band, the worst case as a hollow marker, training radii as dashed verticals."""
    figure, axes = new_axes(390, 270)
    rows = []
    dotted = list(dict.fromkeys(line.attack for line in lines if line.distances is not None))
    for line in lines:
        color, marker, dash = style(line.run)
        eps = [radius for radius, _ in line.points]
        middle, low, high = ([getattr(e, key) for _, e in line.points] for key in ("accuracy", "low", "high"))
        rows += [(runs[line.run].name, line.attack, radius, *estimated(value)) for radius, value in line.points]
        if line.distances is not None:
            axes.fill_between(eps, low, high, color=color, alpha=0.08, linewidth=0, step="post")
            axes.plot(
                eps, middle, color=color, drawstyle="steps-post", linewidth=1.5, marker=marker, markerfacecolor="none",
                markersize=3.6, markeredgewidth=0.9, markevery=max(1, len(eps) // 7),
                linestyle=_DOTTED[dotted.index(line.attack) % len(_DOTTED)],
            )  # fmt: skip
        else:
            number = [other.attack for other in lines if other.run == line.run].index(line.attack)
            axes.fill_between(eps, low, high, color=color, alpha=0.14, linewidth=0)
            axes.plot(eps, middle, color=color, marker=marker, markersize=4.5, linewidth=1.9,
                      linestyle=DASHES[number % len(DASHES)] if number else dash)  # fmt: skip
    for i, run in enumerate(runs):
        if run.record.threat.norm.lower() == norm and (run.record.curve or any(line.run == i for line in lines)):
            color, marker, _ = style(i)
            worst = run.record.worst
            error = [[worst.accuracy - worst.low], [worst.high - worst.accuracy]]
            axes.errorbar(
                [run.record.threat.eps], [worst.accuracy], np.abs(error), color=color, marker=marker, markersize=8,
                capsize=3, markerfacecolor="none", markeredgewidth=1.6, linewidth=1.4,
            )  # fmt: skip
            rows.append((run.name, "worst case over all attacks", run.record.threat.eps, *estimated(worst)))
    texts = {**texts, **trained}
    percent_axis(axes)
    right = max(texts)
    for row, (eps, text) in enumerate(sorted(trained.items())):
        late = eps > 0.6 * right
        axes.axvline(eps, color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)), zorder=1)
        axes.annotate(
            f"training ε = {text}", (eps, 1.0 - 0.07 * row), xytext=(-5 if late else 5, 0), textcoords="offset points",
            color=MUTED, fontsize=9, ha="right" if late else "left", va="center",
        )  # fmt: skip
    axes.set_xlim(-0.02 * right, right * 1.06 or 1)
    ticks: list[float] = []
    for eps in sorted(texts):  # a label needs room: about a ninth of the axis
        if not ticks or eps - ticks[-1] >= right / 9:
            ticks.append(eps)
    axes.set_xticks(ticks, [texts[eps] for eps in ticks])
    head(axes, "Robust accuracy against ε", f"perturbation radius ε ({norm_of(norm)}, pixels in [0, 1])")
    columns = ("run", "attack", f"epsilon ({norm}, pixels in [0, 1])", *ESTIMATED)
    return draw(figure, name, label, columns, rows, [(run.name, i) for i, run in enumerate(runs)])
